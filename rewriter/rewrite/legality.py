"""Whether a match may be replaced. This is the engine's business, never the rule author's.

    L1 closed     no value inside the match is used outside of it, other than its outputs
    L2 placed     there is a place after all inputs and before every use of an output
    L3 effects    nothing in it is random (but for a dropout whose seed the op takes) or written in place (but for an
                  output that the op gives away, later), and no input changes once the match or its replacement has
                  read it
    L4 one mode   gradient mode, and autocast where it says something, are the same for all its nodes and at the
                  insertion point
    L5 autograd   the outputs require gradients exactly where the op's do
    L6 metadata   the op's outputs have the shapes, dtypes, devices and strides of what they replace
    L7 no guards  deciding so has not narrowed the inputs that the graph serves
    L8 rounding   is part of each op's meaning (where a narrowing cast sits is one of its arguments)
    L9 encoded    a weight that is kept encoded goes to an op that reads it so
    L10 plain     no argument is of a tensor subclass, which has products of its own

Each check answers None, or the sentence that the report prints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastlora.graph.effects import REGARDLESS_OF_AUTOCAST
from fastlora.graph.fake_values import hint, known_equal, meta
from fastlora.graph.view import View
from fastlora.kernels.ops import dequantize_4bit
from fastlora.match.rule import Match
from fastlora.match.seeded_dropout import Seed, seeds


class Legality:
    """Checks matches of one graph."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._mutations = view.mutations
        self._modes = view.modes
        self._metas: dict[Any, Any] = {}

    def refusal(self, match: Match) -> str | None:
        """The first reason against the match, or None if it is legal."""
        checks = (
            self._closed, self._placed, self._effects, self._one_mode, self._autograd, self._plain, self._metadata,
            self._encoded,
        )  # fmt: skip
        for check in checks:
            reason = check(match)
            if reason is not None:
                return reason
        return None

    def _closed(self, match: Match) -> str | None:
        inside, free = set(match.members), {*match.outputs, *match.shared}
        for member in match.members:
            if member in free:
                continue
            for user in self._view.users(member):
                if user not in inside:
                    what = "leaves the graph as an output" if user.op == "output" else f"is also used by {user.name}"
                    return f"L1: {member.name}, inside the match, {what}"
        return None

    def _placed(self, match: Match) -> str | None:
        order = self._view.order
        ready = max((order[node] for node in match.argument_nodes()), default=-1)
        needed = min((order[user] for user in match.outside_users()), default=len(order))
        return None if ready < needed else "L2: one of its outputs is used before all its inputs exist"

    def _effects(self, match: Match) -> str | None:
        drawn = {seed.dropout for seed in seeds(match.arguments)}
        for member in match.members:
            term = self._view.term(member)
            if term is not None and term.op == "dropout" and member not in drawn:
                return f"L3: {member.name} is random"
            for writer in self._mutations.writers(member):
                if not self._is_given_away(match, member, writer):
                    return f"L3: {writer.name} writes to {member.name} in place"
        for node in match.argument_nodes():
            writers = self._mutations.writers(node)
            since = self._read_since(match, node) if writers else 0.0
            for writer in writers:
                if self._view.order[writer] >= since:
                    return f"L3: {writer.name} writes to the input {node.name} in place"
        return None

    def _read_since(self, match: Match, node: fx.Node) -> float:
        """Where an input is read first, by the match or by its replacement, which may come before some of its nodes; of
        an input that no member reads as it is, where the match begins."""
        same = set(self._view.value_class(node))
        reading = [member for member in match.members if not same.isdisjoint(member.all_input_nodes)]
        return min(self._view.order[reader] for reader in (*(reading or match.members), match.place()))

    def _is_given_away(self, match: Match, member: fx.Node, writer: fx.Node) -> bool:
        """Whether all that a write changes is an output that the match has no more to do with."""
        after = all(self._view.order[node] < self._view.order[writer] for node in match.members)
        return match.op.gives and member in match.outputs and after

    def _one_mode(self, match: Match) -> str | None:
        at = {self._modes[member] for member in match.members}
        heeding = {self._modes[member] for member in match.members if self._heeds_autocast(member)}
        if len({(grad, *others) for grad, _, *others in at}) > 1 or len(heeding) > 1:
            return "L4: it spans regions with different gradient or autocast modes"
        if self._modes[match.place()] not in at:
            return "L4: the only place for it is in a region with other gradient or autocast modes"
        if self._modes[match.root][3]:
            return "L4: it is inside a transform of torch.func, where its tensors stand for several"
        return None

    def _heeds_autocast(self, node: fx.Node) -> bool:
        term = self._view.term(node)
        return term is None or term.op not in REGARDLESS_OF_AUTOCAST

    def _autograd(self, match: Match) -> str | None:
        grad_enabled = self._modes[match.root][0]
        tensors = [meta(node) for node in match.argument_nodes()]
        expected = grad_enabled and any(t is not None and t.requires_grad for t in tensors) and not match.op.is_constant
        for output in match.outputs:
            found = meta(output)
            if found is not None and found.requires_grad != expected:
                return f"L5: {output.name} {'requires' if found.requires_grad else 'takes'} no gradient as the op would"
        return None

    def _plain(self, match: Match) -> str | None:
        """What a subclass does with its values, such as to round what they are multiplied by, only its owner knows."""
        for node in match.argument_nodes():
            tensor = meta(node)
            if tensor is not None and is_traceable_wrapper_subclass(tensor):
                return f"L10: {node.name} is no plain tensor but of the class {type(tensor).__name__}"
        return None

    def _metadata(self, match: Match) -> str | None:
        try:
            results = self.fake_results(match)
        except Exception as error:  # the op itself turned the arguments down
            return f"L6: {match.op.name} does not accept the arguments: {error}"
        if isinstance(results, str):
            return results
        for output, result in zip(match.outputs, results, strict=True):
            reason = _differs(output, result)
            if reason is not None:
                return f"L6: {reason}"
        return None

    def _encoded(self, match: Match) -> str | None:
        """Other ops would keep a weight decoded, for which it was not encoded."""
        for name, value in match.arguments.items():
            for node in value if isinstance(value, list) else [value]:
                if isinstance(node, fx.Node) and node.target is dequantize_4bit.target and name not in match.op.decodes:
                    return f"L9: {match.op.name} does not read its {name} encoded"
        return None

    def fake_results(self, match: Match) -> list[torch.Tensor] | str:
        """What the op returns for the metadata of the arguments, or why asking is not possible without new guards."""
        values = match.op.order(match.arguments)
        key = (match.op.name, tuple(_signature(value) for value in values))
        if key not in self._metas:
            self._metas[key] = _run_fake(match, values)
        return self._metas[key]


def _signature(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_signature(item) for item in value)
    tensor = meta(value)
    if tensor is None:
        return str(value)
    return (str(tuple(tensor.shape)), str(tensor.stride()), tensor.dtype, str(tensor.device))


def _run_fake(match: Match, values: list[Any]) -> list[torch.Tensor] | str:
    def example(value: Any) -> Any:
        if isinstance(value, list):
            return [example(item) for item in value]
        if isinstance(value, Seed):
            return value.example()
        found = value.meta.get("example_value") if isinstance(value, fx.Node) else value
        return hint(found) if isinstance(found, torch.SymFloat) else found  # calling an op would fix its value

    arguments = [example(value) for value in values]
    fakes = [t for a in arguments for t in (a if isinstance(a, list) else [a]) if isinstance(t, FakeTensor)]
    mode = fakes[0].fake_mode
    shapes = mode.shape_env
    before = len(shapes.guards) if shapes is not None else 0
    with mode, torch.no_grad():
        results = match.op.target(*arguments)
    if shapes is not None and len(shapes.guards) != before:
        return "L7: it would narrow the shapes that the graph serves"
    declared = (*match.op.outputs, *match.op.residuals)
    results = results if len(declared) > 1 else (results,)
    outputs = results[: len(match.op.outputs)]
    return [t for o in outputs for t in (o if isinstance(o, (list, tuple)) else [o])]


def _differs(output: fx.Node, result: torch.Tensor) -> str | None:
    found = meta(output)
    if found is None:
        return f"{output.name} holds no tensor"
    if found.dtype != result.dtype:
        return f"{output.name} is {found.dtype}, the op gives {result.dtype}"
    if found.device != result.device:
        return f"{output.name} is on {found.device}, the op's result on {result.device}"
    if found.dim() != result.dim() or not all(map(known_equal, found.shape, result.shape)):
        return f"{output.name} has shape {tuple(found.shape)}, the op gives {tuple(result.shape)}"
    strides = zip(found.shape, found.stride(), result.stride(), strict=True)
    if any(not known_equal(size, 1) and not known_equal(mine, its) for size, mine, its in strides):
        return f"{output.name} has strides {found.stride()}, the op gives {result.stride()}"
    return None
