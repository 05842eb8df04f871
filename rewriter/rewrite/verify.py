"""Replays a match and compares it with what would replace it, the op and the expression around it.

In float64, on random values and with casts erased, outputs and all gradients must agree with the op's reference to
1e-10. In the traced dtypes the replacement may be at most 1.25 times as far from that result as the original is, plus
the rounding of the dtype. A dropout that the op does itself drops the same elements on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx

from fastlora.graph.fake_values import hint, meta
from fastlora.graph.view import View
from fastlora.kernels.core import grouped_mm
from fastlora.match.rule import Match
from fastlora.match.seeded_dropout import Seed, seeds
from fastlora.rewrite.refusal import Code, Refusal

_ALGEBRA = 1e-10
_SLACK = 1.25
_SEEN: dict[Any, str | None] = {}


def disagreement(match: Match) -> Refusal | None:
    """Return why the op is not the same computation as the matched nodes, or None. Each structure is replayed once."""
    constants = [str(value) for value in match.op.order(match.arguments) if not isinstance(value, fx.Node)]
    targets = [
        str((n.target, *fx.node.map_arg((n.args, n.kwargs), lambda _: "value")))  # with its constants
        for n in match.members
    ]
    key = (match.rule, *targets, *constants, *map(_kind, match.argument_nodes()))
    if key not in _SEEN:
        # A checkpoint may be recording what is saved for backward, which must not include a replay.
        unrecorded = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        with torch.random.fork_rng(), torch.enable_grad(), unrecorded:
            torch.manual_seed(0)
            _SEEN[key] = _compare(match)
    text = _SEEN[key]
    return None if text is None else Refusal(Code.NUMERICS, match.root, f"verification failed: {text}")


def _kind(node: fx.Node) -> Any:
    tensor = meta(node)
    return None if tensor is None else (tensor.dtype, tuple(map(hint, tensor.shape)))


def _compare(match: Match) -> str | None:
    inputs = {node: _random(meta(node)) for node in dict.fromkeys(match.argument_nodes()) if meta(node) is not None}
    inputs |= _sampled(match, inputs)
    exact = {node: tensor.double() if tensor.is_floating_point() else tensor for node, tensor in inputs.items()}
    device = next(iter(inputs.values())).device.type
    original, native = _replay(match, inputs, False), _reference(match, inputs, False)
    with torch.autocast(device, enabled=False):
        truth, algebra = _replay(match, exact, True), _reference(match, exact, True)
    for name, true, mine in zip(_names(match, exact), truth, algebra, strict=True):
        if _distance(mine, true) > _ALGEBRA:
            return f"in float64 {name} differs by {_distance(mine, true):.1e}"
    for name, true, before, after in zip(_names(match, exact), truth, original, native, strict=True):
        floor = 4 * torch.finfo(after.dtype).eps
        if _distance(after, true) > _SLACK * _distance(before, true) + floor:
            errors = f"an error of {_distance(after, true):.1e}, up from {_distance(before, true):.1e}"
            return f"{name} would be less exact, with {errors}"
    return None


def _autocast_of(view: View, node: fx.Node) -> AbstractContextManager[Any]:
    """The autocast region of the graph around a node; one around the whole graph is active already."""
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
    """The arguments for which the op declares how to make a meaningful value, as random ones would not be."""
    given = {n: inputs[v] for n, v in match.arguments.items() if isinstance(v, fx.Node) and v in inputs}
    return {match.arguments[name]: make(given) for name, make in match.op.policy.samples.items()}


def _with_gradients(
    run: Callable[[dict[fx.Node, torch.Tensor]], list[torch.Tensor]], inputs: dict[fx.Node, torch.Tensor]
) -> list[torch.Tensor]:
    leaves = {node: t.clone().requires_grad_(t.is_floating_point()) for node, t in inputs.items()}
    outputs = run(leaves)
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o) for o in outputs]
    wanted = [t for t in leaves.values() if t.requires_grad]
    ends = [(o, g) for o, g in zip(outputs, incoming, strict=True) if o.requires_grad]
    gradients: Any = [None] * len(wanted)
    if ends:
        tensors, cotangents = zip(*ends, strict=True)
        gradients = torch.autograd.grad(tensors, wanted, cotangents, allow_unused=True)
    return [*outputs, *(torch.zeros_like(t) if g is None else g for g, t in zip(gradients, wanted, strict=True))]


def _replay(match: Match, inputs: dict[fx.Node, torch.Tensor], exact: bool) -> list[torch.Tensor]:
    """Run the matched nodes and the identities between them; `exact` erases their casts."""
    view = match.view
    drawn = {seed.dropout: seed for seed in seeds(match.arguments)}

    def run(leaves: dict[fx.Node, torch.Tensor]) -> list[torch.Tensor]:
        values: dict[fx.Node, Any] = {same: leaf for n, leaf in leaves.items() for same in view.value_class(n)}
        values |= {n: hint(n.meta.get("example_value")) for n in match.argument_nodes() if meta(n) is None}

        def value(node: fx.Node) -> Any:
            if node not in values:
                term = view.term(node)
                if node in drawn and term is not None:
                    values[node] = drawn[node].replay(value(term.args["input"]))
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
    if exact and term is not None and term.op == "grouped_mm":  # PyTorch has none in float64
        return grouped_mm.reference(*(value(term.args[name]) for name in ("input", "mat2", "offs")))
    with nullcontext() if exact else _autocast_of(view, node):
        if node.op == "call_method":
            result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
    made = exact and isinstance(result, torch.Tensor) and result.is_floating_point()
    return result.double() if made else result  # tensors that the graph creates have a dtype of their own


def _reference(match: Match, inputs: dict[fx.Node, torch.Tensor], exact: bool) -> list[torch.Tensor]:
    """Run the op: its reference in float64, or the op itself with its own backward in the traced dtypes."""
    device = next(iter(inputs.values())).device

    def run(leaves: dict[fx.Node, torch.Tensor]) -> list[torch.Tensor]:
        def argument(value: Any) -> Any:
            if isinstance(value, list):
                return [argument(item) for item in value]
            if isinstance(value, Seed):
                return value.fixed(device)
            if isinstance(value, fx.Node):
                return leaves.get(value, hint(value.meta.get("example_value")))
            return torch.float64 if exact and isinstance(value, torch.dtype) else value

        arguments = {name: argument(value) for name, value in match.arguments.items()}
        if exact:
            full = {a.name: arguments.get(a.name) for a in match.op.arguments}
            results = match.op.reference(**full)
        else:
            results = match.op(**arguments)
        results = results if isinstance(results, (tuple, list)) else (results,)
        flat = [t for result in results for t in (result if isinstance(result, (tuple, list)) else [result])]
        return flat if match.rule.result is None else match.rule.result(flat, arguments.__getitem__)

    return _with_gradients(run, inputs)


def _distance(mine: torch.Tensor, truth: torch.Tensor) -> float:
    """The relative distance in the norm of the whole tensor."""
    scale = truth.double().norm().clamp_min(1e-30)
    return float((mine.double() - truth.double()).norm() / scale)
