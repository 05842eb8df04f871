"""Verifying a match: replay its nodes, and compare them with the op and the expression around it.

In float64, on random values and without casts, outputs and all gradients must agree with the op's reference to 1e-10.
In the traced dtypes, the error of the replacement may be at most 1.25 times that of the original, plus the rounding of
the dtype. A dropout that the op itself computes drops the same elements on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx

from fastlora.graph.derived import DerivedValue
from fastlora.graph.fake_values import hint, meta
from fastlora.graph.view import View
from fastlora.kernels.core import grouped_mm
from fastlora.match.rule import Match
from fastlora.match.seeded_dropout import Seed, seeds
from fastlora.rewrite.refusal import Code, Refusal

_FLOAT64_TOLERANCE = 1e-10
_ERROR_RATIO = 1.25
_VERIFIED: dict[Any, str | None] = {}


def mismatch(match: Match) -> Refusal | None:
    """Return a refusal if the op does not compute the same as the matched nodes. Each structure is replayed once."""
    constants = [str(value) for value in match.op.order(match.arguments) if not isinstance(value, fx.Node)]
    targets = [
        str((n.target, *fx.node.map_arg((n.args, n.kwargs), lambda _: "value")))  # with its constants
        for n in match.members
    ]
    key = (match.rule, *targets, *constants, *map(_dtype_and_shape, match.argument_nodes()))
    if key not in _VERIFIED:
        # These hooks hide the replay from a checkpoint, which may be recording saved tensors.
        hide_saved = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        with torch.random.fork_rng(), torch.enable_grad(), hide_saved:
            torch.manual_seed(0)
            _VERIFIED[key] = _compare(match)
    text = _VERIFIED[key]
    return None if text is None else Refusal(Code.NUMERICS, match.root, f"verification failed: {text}")


def _dtype_and_shape(node: fx.Node) -> Any:
    tensor = meta(node)
    return None if tensor is None else (tensor.dtype, tuple(map(hint, tensor.shape)))


def _compare(match: Match) -> str | None:
    inputs = {node: _random(meta(node)) for node in dict.fromkeys(match.argument_nodes()) if meta(node) is not None}
    inputs |= _sampled(match, inputs)
    doubles = {node: tensor.double() if tensor.is_floating_point() else tensor for node, tensor in inputs.items()}
    device = next(iter(inputs.values())).device.type
    originals, fused = _replay(match, inputs, False), _run_op(match, inputs, False)
    with torch.autocast(device, enabled=False):
        truths, references = _replay(match, doubles, True), _run_op(match, doubles, True)
    names = _names(match, doubles)
    for name, truth, reference in zip(names, truths, references, strict=True):
        if (error := _relative_error(reference, truth)) > _FLOAT64_TOLERANCE:
            return f"in float64 {name} differs by {error:.1e}"
    for name, truth, original, result in zip(names, truths, originals, fused, strict=True):
        before, after = _relative_error(original, truth), _relative_error(result, truth)
        if after > _ERROR_RATIO * before + 4 * torch.finfo(result.dtype).eps:
            return f"{name} would be less exact, with an error of {after:.1e}, up from {before:.1e}"
    return None


def _autocast_of(view: View, node: fx.Node) -> AbstractContextManager[Any]:
    """Return the autocast context in the graph around a node; autocast around the whole graph is already active."""
    regions = view.modes[node][1]
    arguments: Any = regions[-1].args if regions else ()
    return torch.autocast(*arguments) if regions else nullcontext()


def _names(match: Match, inputs: dict[fx.Node, torch.Tensor]) -> list[str]:
    outputs = [output.name for output in match.outputs]
    return outputs + [f"the gradient of {node.name}" for node, t in inputs.items() if t.is_floating_point()]


def _random(example: torch.Tensor | None) -> torch.Tensor:
    assert example is not None
    shape = [hint(size) for size in example.shape]
    if example.is_floating_point():
        return torch.randn(shape, device=example.device).to(example.dtype)
    return torch.randint(0, 2, shape, device=example.device).to(example.dtype)


def _sampled(match: Match, inputs: dict[fx.Node, torch.Tensor]) -> dict[fx.Node, torch.Tensor]:
    """Return the samples that the op declares for arguments of which random values would be meaningless."""
    arguments = {n: inputs[v] for n, v in match.arguments.items() if isinstance(v, fx.Node) and v in inputs}
    return {match.arguments[name]: sample(arguments) for name, sample in match.op.policy.samples.items()}


def _with_gradients(
    run: Callable[[dict[fx.Node, torch.Tensor]], list[torch.Tensor]], inputs: dict[fx.Node, torch.Tensor]
) -> list[torch.Tensor]:
    """Return the outputs of `run`, and the gradients of its floating-point inputs for fixed gradients of the
    outputs."""
    leaves = {node: t.clone().requires_grad_(t.is_floating_point()) for node, t in inputs.items()}
    outputs = run(leaves)
    generator = torch.Generator().manual_seed(1)
    grad_outputs = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    differentiable = [t for t in leaves.values() if t.requires_grad]
    roots = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if o.requires_grad]
    grads: Any = [None] * len(differentiable)
    if roots:
        tensors, cotangents = zip(*roots, strict=True)
        grads = torch.autograd.grad(tensors, differentiable, cotangents, allow_unused=True)
    return [*outputs, *(torch.zeros_like(t) if g is None else g for g, t in zip(grads, differentiable, strict=True))]


def _replay(match: Match, inputs: dict[fx.Node, torch.Tensor], exact: bool) -> list[torch.Tensor]:
    """Run the matched nodes and the identities between them, if `exact` without casts."""
    view = match.view
    seed_of = {seed.dropout: seed for seed in seeds(match.arguments)}

    def run(leaves: dict[fx.Node, torch.Tensor]) -> list[torch.Tensor]:
        values: dict[fx.Node, Any] = {same: leaf for n, leaf in leaves.items() for same in view.value_class(n)}
        values |= {n: hint(n.meta.get("example_value")) for n in match.argument_nodes() if meta(n) is None}

        def value(node: fx.Node) -> Any:
            if node not in values:
                term = view.term(node)
                if node in seed_of and term is not None:
                    values[node] = seed_of[node].replay(value(term.args["input"]))
                elif exact and (node is not view.producer(node) or (term is not None and term.op == "cast")):
                    values[node] = value(node.all_input_nodes[0])
                else:
                    values[node] = _call(view, node, value, exact)
            return values[node]

        return [value(output) for output in match.outputs]

    return _with_gradients(run, inputs)


def _call(view: View, node: fx.Node, value: Callable[[fx.Node], Any], exact: bool) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
    term = view.term(node)
    if exact and term is not None and term.op == "grouped_mm":  # PyTorch does not support it in float64
        return grouped_mm.reference(*(value(term.args[name]) for name in ("input", "mat2", "offs")))
    if node in view.functional_writes:
        first: Any = args[0]
        args = (first.clone(), *args[1:])  # it may be one of the inputs
    with nullcontext() if exact else _autocast_of(view, node):
        if node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
    is_float = isinstance(result, torch.Tensor) and result.is_floating_point()
    return result.double() if exact and is_float else result  # a tensor that the graph creates may have another dtype


def _run_op(match: Match, inputs: dict[fx.Node, torch.Tensor], exact: bool) -> list[torch.Tensor]:
    """Run the op: its reference in float64 if `exact`, else the op with its own backward in the traced dtypes."""
    device = next(iter(inputs.values())).device

    def run(leaves: dict[fx.Node, torch.Tensor]) -> list[torch.Tensor]:
        def argument(value: Any) -> Any:
            if isinstance(value, list):
                return [argument(item) for item in value]
            if isinstance(value, Seed):
                return value.fixed(device)
            if isinstance(value, DerivedValue):
                return value.evaluate(argument)
            if isinstance(value, fx.Node):
                return leaves.get(value, hint(value.meta.get("example_value")))
            return torch.float64 if exact and isinstance(value, torch.dtype) else value

        arguments = {name: argument(value) for name, value in match.arguments.items()}
        if exact:
            results = match.op.reference(**{a.name: arguments.get(a.name) for a in match.op.arguments})
        else:
            results = match.op(**arguments)
        results = results if isinstance(results, (tuple, list)) else (results,)
        flat = [t for result in results for t in (result if isinstance(result, (tuple, list)) else [result])]
        return flat if match.rule.result is None else match.rule.result(flat, arguments.__getitem__)

    return _with_gradients(run, inputs)


def _relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the norm of the error relative to that of the truth."""
    scale = truth.double().norm().clamp_min(1e-30)
    return float((result.double() - truth.double()).norm() / scale)
