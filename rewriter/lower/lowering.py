"""From a rewritten graph to something that runs: the graph itself, or Inductor's compilation of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from fastlora.compat.dynamo import checkpoint_context, compile_with_inductor
from fastlora.graph.bodies import bodies
from fastlora.graph.fake_values import hint, steady
from fastlora.kernels.core.call_site import call_site
from fastlora.kernels.core.library import REGISTERED
from fastlora.lower.decode import quantized_arguments
from fastlora.lower.rematerialize import DerivedNode, recomputable_arguments
from fastlora.rewrite import quantized

Runnable = Callable[..., Any]


def lower(gm: fx.GraphModule, inputs: Sequence[Any], how: str, mode: str) -> Runnable:
    """Return what runs a rewritten graph.

    Args:
        gm, inputs: the graph and the example inputs that TorchDynamo gave with it.
        how: `eager` runs the graph as it is; `inductor` compiles what no pattern covered.
        mode: a mode of Inductor, such as `max-autotune`; `eager` ignores it.
    """
    if how == "inductor":
        return compile_with_inductor(gm, inputs, None if mode in ("default", "no-cudagraphs") else mode)
    call_directly(gm)
    checkpoint_as_eager_does(gm)  # last, as bodies are found by the targets that change here
    return gm.forward


def call_directly(gm: fx.GraphModule) -> None:
    """Have a graph that runs eagerly call its ops past the dispatcher, as call sites that save what they need.

    Ops read quantized weights as they are stored, and norms' outputs are recomputed in the backward instead of being
    saved, but for those in checkpointed bodies, which save nothing until they are recomputed.
    """
    derived: dict[fx.Node, list[DerivedNode]] = {}
    found = list(recomputable_arguments(gm.graph))
    for body in bodies(gm):
        found += quantized_arguments(body.graph)
    for each in found:
        derived.setdefault(each.node, []).append(each)
    for body in bodies(gm):
        quantized.tidy(body.graph)
        for node in body.graph.nodes:
            if node.target in REGISTERED:
                _bind(node, derived.get(node, []))
        body.recompile()


def _bind(node: fx.Node, derived: list[DerivedNode]) -> None:
    """Make a call of an op the call of a call site, which has the constants."""
    op = REGISTERED[node.target]
    site, given = call_site(op, node.args, [(each.argument, each.values) for each in derived], _varies)
    node.target, node.args = site, tuple(given)


def _varies(value: Any) -> bool:
    return isinstance(value, fx.Node)


def checkpoints(gm: fx.GraphModule) -> bool:
    """Whether a graph, not yet lowered, has checkpointed regions."""
    target = torch.ops.higher_order.tag_activation_checkpoint
    return any(node.target is target for body in bodies(gm) for node in body.graph.nodes)


def checkpoint_as_eager_does(gm: fx.GraphModule) -> None:
    """Have checkpointed regions of a graph that runs eagerly call `checkpoint`, as they do outside of graphs.

    Run eagerly, `tag_activation_checkpoint` calls `checkpoint(..., preserve_rng_state=False)` and relies on AOTAutograd
    to draw the same random numbers when a region is recomputed: a dropout would have another mask, and the gradients
    would be wrong without an error. It also ignores `use_reentrant`, and passes what modules hold as activations.
    """
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    held = {inputs[i] for i in steady(gm)}
    for body in list(bodies(gm)):  # found first, as they are found by the targets that change here
        for node in body.graph.nodes:
            if node.target is torch.ops.higher_order.tag_activation_checkpoint:
                node.target = run_checkpointed
                node.kwargs = {
                    "held": tuple(i for i, value in enumerate(node.args[1:]) if value in held),
                    "reentrant": bool(node.kwargs.get("use_reentrant", False)),
                }
        body.recompile()


def run_checkpointed(body: fx.GraphModule, *args: Any, held: Sequence[int] = (), reentrant: bool = False) -> Any:
    """Run a checkpointed region of a graph that runs eagerly.

    Args:
        body, args: the region, and all that it reads.
        held: positions of what modules hold, which may change before the region is recomputed, as batch statistics do
            in its own forward. `checkpoint` raises if activations change.
        reentrant: whether `use_reentrant=True` was asked for. Then nothing has a gradient, parameters included, unless
            an activation has one; otherwise there is no difference.
    """
    kept = frozenset(held)
    activations = [arg for i, arg in enumerate(args) if i not in kept]
    if not any(isinstance(arg, torch.Tensor) for arg in activations):  # which tell whose random states to keep
        kept, activations = frozenset(), list(args)
    if reentrant and not any(_leads_back(arg) for arg in activations):
        with torch.no_grad():
            return body(*args)

    def run(*activations: Any) -> Any:
        given = iter(activations)
        return body(*(arg if i in kept else next(given) for i, arg in enumerate(args)))

    context = checkpoint_context(body)
    options: dict[str, Any] = {} if context is None else {"context_fn": context}
    return checkpoint(run, *activations, use_reentrant=False, preserve_rng_state=True, **options)


def _leads_back(arg: Any) -> bool:
    """Whether an argument is an activation that requires a gradient."""
    return isinstance(arg, torch.Tensor) and arg.requires_grad and not isinstance(arg, nn.Parameter)


def pretend(gm: fx.GraphModule) -> Runnable:
    """Return a function that returns zeros of the right shapes, so that what comes after a graph can be traced."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    outputs = next(iter(reversed(gm.graph.nodes))).args[0]

    def run(*args: Any) -> Any:
        given = dict(zip(placeholders, args, strict=True))
        return fx.node.map_arg(outputs, lambda node: given[node] if node in given else _zeros(node))

    return run


def _zeros(node: fx.Node) -> Any:
    example = node.meta.get("example_value")
    if not isinstance(example, torch.Tensor):
        return hint(example)
    shape = [hint(size) for size in example.shape]
    zeros = torch.zeros(shape, dtype=example.dtype, device=example.device)
    return zeros.requires_grad_(example.requires_grad)
