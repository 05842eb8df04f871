"""Checking whether a match may be replaced, for every rule, so that rule authors do not have to.

    ESCAPES    no intermediate value is used outside the match; outputs may be
    ORDER      there is a place after all inputs and before every use of an output
    EFFECT     no node is random, except a dropout whose seed the op takes; no value is written in place, except an
               output that is mutable, after the match; and no input is written after the match, or its replacement,
               has read it
    MODE       gradient mode, and autocast where it matters, are the same for all nodes and at the insertion point
    AUTOGRAD   the outputs require gradients exactly where the op's outputs would
    SUBCLASS   no argument is a tensor subclass, which may define its own operations
    METADATA   the op's outputs have the shapes, dtypes, devices and strides of what they replace
    GUARDS     checking the metadata adds no guard on dynamic shapes
    QUANTIZED  a 4-bit weight is read by an op that reads it in 4 bits

Where a value is rounded is not checked here: it is part of each op's definition, by arguments such as `norm_dtype`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastlora.compat.dispatch import is_wrapper_subclass
from fastlora.compat.tracing import FakeTensor
from fastlora.graph.canonical_ops import operation
from fastlora.graph.derived import DerivedValue
from fastlora.graph.fake_values import hint, known_equal, meta
from fastlora.graph.view import View
from fastlora.kernels.ops import dequantize_4bit
from fastlora.match.rule import Match
from fastlora.match.seeded_dropout import Seed, seeds
from fastlora.rewrite.refusal import Code, Refusal


class Legality:
    """Checks the matches of one graph."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._modes = view.modes
        self._results: dict[Any, Any] = {}

    def refusal(self, match: Match) -> Refusal | None:
        """Return the first reason against the match, or None if it is legal."""
        checks = (
            self._escapes, self._order, self._effects, self._mode, self._autograd, self._subclass, self._metadata,
            self._quantized,
        )  # fmt: skip
        return next((found for check in checks if (found := check(match)) is not None), None)

    def _escapes(self, match: Match) -> Refusal | None:
        inside, may_escape = set(match.members), {*match.outputs, *match.shared}
        for member in match.members:
            if member in may_escape:
                continue
            for user in self._view.users(member):
                if user not in inside:
                    what = "leaves the graph as an output" if user.op == "output" else f"is also used by {user.name}"
                    return Refusal(Code.ESCAPES, member, f"the intermediate value {member.name} {what}")
        return None

    def _order(self, match: Match) -> Refusal | None:
        order = self._view.order
        ready = max((order[node] for node in match.argument_nodes()), default=-1)
        users = match.outside_users()
        needed = min((order[user] for user in users), default=len(order))
        if ready < needed:
            return None
        first = min(users, key=order.__getitem__)
        return Refusal(Code.ORDER, first, f"{first.name} uses an output before all inputs are computed")

    def _effects(self, match: Match) -> Refusal | None:
        seeded = {seed.dropout for seed in seeds(match.arguments)}
        members = set(match.members)
        for member in match.members:
            term = self._view.term(member)
            if term is not None and term.op == "dropout" and member not in seeded:
                return Refusal(Code.EFFECT, member, f"{member.name} is random, which the fused op is not")
            for writer in self._view.writers(member):
                if writer not in members and not self._may_write(match, member, writer):
                    return Refusal(Code.EFFECT, writer, f"{writer.name} writes to {member.name} in place")
        for node in match.argument_nodes():
            writers = [writer for writer in self._view.writers(node) if writer not in members]
            first_read = self._first_read(match, node) if writers else 0.0
            for writer in writers:
                if self._view.order[writer] >= first_read:
                    return Refusal(Code.EFFECT, writer, f"{writer.name} writes to the input {node.name} in place")
        return None

    def _first_read(self, match: Match, node: fx.Node) -> float:
        """Return the position at which the match, or its replacement, first reads an input. The replacement may come
        before some nodes of the match; if no member reads the input itself, the match may read it from its start."""
        same = set(self._view.value_class(node))
        readers = [member for member in match.members if not same.isdisjoint(member.all_input_nodes)]
        return min(self._view.order[reader] for reader in (*(readers or match.members), match.insertion_point()))

    def _may_write(self, match: Match, member: fx.Node, writer: fx.Node) -> bool:
        """Return whether a write is to a mutable output of the op, after all nodes of the match. The result of an
        expression around the op may share memory with other values, so it is not mutable."""
        mutable = match.rule.result is None and match.op.policy.outputs_mutable and member in match.outputs
        return mutable and all(self._view.order[node] < self._view.order[writer] for node in match.members)

    def _mode(self, match: Match) -> Refusal | None:
        modes = {self._modes[member] for member in match.members}
        dependent = {self._modes[member] for member in match.members if self._depends_on_autocast(member)}
        if len({(grad, *others) for grad, _, *others in modes}) > 1 or len(dependent) > 1:
            return Refusal(Code.MODE, match.root, "its nodes run in different gradient or autocast modes")
        if self._modes[insertion_point := match.insertion_point()] not in modes:
            text = "the fused op would run in another gradient or autocast mode"
            return Refusal(Code.MODE, insertion_point, text)
        if self._modes[match.root][3]:
            return Refusal(Code.MODE, match.root, "it runs inside a torch.func transform")
        return None

    def _depends_on_autocast(self, node: fx.Node) -> bool:
        term = self._view.term(node)
        return term is None or not operation(term.op).ignores_autocast

    def _autograd(self, match: Match) -> Refusal | None:
        grad_enabled = self._modes[match.root][0]
        tensors = [meta(node) for node in match.argument_nodes()]
        expected = grad_enabled and any(t is not None and t.requires_grad for t in tensors) and not match.op.is_constant
        for output in match.outputs:
            found = meta(output)
            if found is not None and found.requires_grad != expected:
                has, gets = ("a", "none") if found.requires_grad else ("no", "one")
                text = f"{output.name} requires {has} gradient, and the fused op's output would require {gets}"
                return Refusal(Code.AUTOGRAD, output, text)
        return None

    def _subclass(self, match: Match) -> Refusal | None:
        """Refuse tensor subclasses: they define what an operation computes, such as rounding its inputs."""
        for node in match.argument_nodes():
            tensor = meta(node)
            if tensor is not None and is_wrapper_subclass(tensor):
                return Refusal(Code.SUBCLASS, node, f"{node.name} is of the tensor subclass {type(tensor).__name__}")
        return None

    def _metadata(self, match: Match) -> Refusal | None:
        try:
            results = self.fake_results(match)
        except Exception as error:  # the op itself rejects the arguments
            return Refusal(Code.METADATA, match.root, f"{match.op.name} does not accept the arguments: {error}")
        if results is None:
            return Refusal(Code.GUARDS, match.root, "fusing it would add guards on dynamic shapes")
        for output, result in zip(match.outputs, results, strict=True):
            if (difference := _difference(output, result)) is not None:
                return Refusal(Code.METADATA, output, f"{output.name} {difference}")
        return None

    def _quantized(self, match: Match) -> Refusal | None:
        """Refuse 4-bit weights as arguments that the op does not read in 4 bits: it would save the dequantized
        weight."""
        for name, value in match.arguments.items():
            if name in match.op.policy.reads_quantized:
                continue
            for node in value if isinstance(value, list) else [value]:
                if isinstance(node, fx.Node) and node.target is dequantize_4bit.target:
                    return Refusal(Code.QUANTIZED, node, f"{match.op.name} does not read its {name} in 4 bits")
        return None

    def fake_results(self, match: Match) -> list[torch.Tensor] | None:
        """Return the replacements of the outputs as fake tensors, or None if computing them adds guards."""
        values = match.op.order(match.arguments)
        key = (match.op.name, match.rule.result, tuple(_signature(value) for value in values))
        if key not in self._results:
            self._results[key] = _run_fake(match, values)
        match.op_outputs, results = self._results[key] or ([], None)
        return results


def _signature(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_signature(item) for item in value)
    tensor = meta(value)
    if tensor is None:
        return str(value)
    return (str(tuple(tensor.shape)), str(tensor.stride()), tensor.dtype, str(tensor.device))


def _run_fake(match: Match, values: list[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """Return the op's outputs and the results of the expression around it, or None if computing them adds guards."""

    def example(value: Any) -> Any:
        if isinstance(value, list):
            return [example(item) for item in value]
        if isinstance(value, Seed):
            return value.example()
        if isinstance(value, DerivedValue):
            return value.example
        found = value.meta.get("example_value") if isinstance(value, fx.Node) else value
        return hint(found) if isinstance(found, torch.SymFloat) else found  # calling an op would specialize it

    arguments = [example(value) for value in values]
    fakes = [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, FakeTensor)]
    mode = fakes[0].fake_mode
    shapes = mode.shape_env
    before = len(shapes.guards) if shapes is not None else 0
    with mode, torch.no_grad():
        returned = match.op.target(*arguments)
        is_tuple = len(match.op.outputs) + len(match.op.residuals) > 1
        outputs = (returned if is_tuple else (returned,))[: len(match.op.outputs)]
        flat = [t for o in outputs for t in (o if isinstance(o, (list, tuple)) else [o])]
        by_name = dict(zip(match.op.names, arguments, strict=False))
        results = flat if match.rule.result is None else match.rule.result(flat, by_name.__getitem__)
    if shapes is not None and len(shapes.guards) != before:
        return None
    return flat, results


def _difference(output: fx.Node, result: torch.Tensor) -> str | None:
    """Return how the metadata of an output and of the op's result differ, or None."""
    found = meta(output)
    if found is None:
        return "is not a tensor"
    if found.dtype != result.dtype:
        return f"is {found.dtype}, but the op returns {result.dtype}"
    if found.device != result.device:
        return f"is on {found.device}, but the op returns a tensor on {result.device}"
    if found.dim() != result.dim() or not all(map(known_equal, found.shape, result.shape)):
        return f"has shape {tuple(found.shape)}, but the op returns {tuple(result.shape)}"
    strides = zip(found.shape, found.stride(), result.stride(), strict=True)
    if any(not known_equal(size, 1) and not known_equal(old, new) for size, old, new in strides):
        return f"has strides {found.stride()}, but the op returns {result.stride()}"
    return None
