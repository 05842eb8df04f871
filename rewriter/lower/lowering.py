"""Lowering a rewritten graph to a function: the graph itself with call sites for its ops, or Inductor's output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from fastlora.compat.dynamo import checkpoint_context, compile_with_inductor
from fastlora.graph.bodies import bodies
from fastlora.graph.fake_values import hint, static_input_indices
from fastlora.kernels.core.call_site import call_site
from fastlora.kernels.core.library import REGISTERED
from fastlora.lower.decode import quantized_arguments
from fastlora.lower.rematerialize import DerivedNode, recomputable_arguments
from fastlora.rewrite import quantized

Runnable = Callable[..., Any]


def lower(gm: fx.GraphModule, inputs: Sequence[Any], how: str, mode: str) -> Runnable:
    """Return the function that runs a rewritten graph.

    Args:
        gm, inputs: the graph, and the example inputs that TorchDynamo has passed with it.
        how: `eager` runs the graph as it is; `inductor` compiles what no rule covers.
        mode: a mode of Inductor, such as `max-autotune`; `eager` ignores it.
    """
    if how == "inductor":
        return compile_with_inductor(gm, inputs, None if mode in ("default", "no-cudagraphs") else mode)
    bind_call_sites(gm)
    use_eager_checkpoints(gm)  # last: it changes the targets by which `bodies` finds checkpointed bodies
    return gm.forward


def bind_call_sites(gm: fx.GraphModule) -> None:
    """Replace the ops of a graph that runs eagerly by call sites, which bypass the dispatcher.

    Ops read quantized weights as they are stored, and recompute the outputs of norms in the backward instead of saving
    them, except in checkpointed bodies, which save nothing until they are recomputed.
    """
    derived: dict[fx.Node, list[DerivedNode]] = {}
    found = list(recomputable_arguments(gm.graph))
    for body in bodies(gm):
        found += quantized_arguments(body.graph)
    for each in found:
        derived.setdefault(each.node, []).append(each)
    for body in bodies(gm):
        quantized.erase_unused(body.graph)
        for node in body.graph.nodes:
            if node.target in REGISTERED:
                _bind(node, derived.get(node, []))
        body.recompile()


def _bind(node: fx.Node, derived: list[DerivedNode]) -> None:
    """Replace a call of an op by a call site to which the constants are bound."""
    op = REGISTERED[node.target]
    site, args = call_site(op, node.args, [(each.argument, each.values) for each in derived], _is_node)
    node.target, node.args = site, tuple(args)


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def has_checkpoints(gm: fx.GraphModule) -> bool:
    """Return whether a graph that is not yet lowered has checkpointed regions."""
    target = torch.ops.higher_order.tag_activation_checkpoint
    return any(node.target is target for body in bodies(gm) for node in body.graph.nodes)


def use_eager_checkpoints(gm: fx.GraphModule) -> None:
    """Make checkpointed regions of a graph that runs eagerly call `checkpoint`, as they do without a graph.

    Run eagerly, `tag_activation_checkpoint` calls `checkpoint(..., preserve_rng_state=False)` and relies on AOTAutograd
    to draw the same random numbers when a region is recomputed: dropout would have another mask, and the gradients
    would silently be wrong. It also ignores `use_reentrant`, and passes attributes of modules as activations.
    """
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    static_inputs = {inputs[i] for i in static_input_indices(gm)}
    for body in list(bodies(gm)):  # a list, as the loop changes the targets by which `bodies` finds them
        for node in body.graph.nodes:
            if node.target is torch.ops.higher_order.tag_activation_checkpoint:
                node.target = run_checkpointed
                node.kwargs = {
                    "static_inputs": tuple(i for i, value in enumerate(node.args[1:]) if value in static_inputs),
                    "reentrant": bool(node.kwargs.get("use_reentrant", False)),
                }
        body.recompile()


def run_checkpointed(
    body: fx.GraphModule, *args: Any, static_inputs: Sequence[int] = (), reentrant: bool = False
) -> Any:
    """Run a checkpointed region of a graph that runs eagerly.

    Args:
        body, args: the region, and its inputs.
        static_inputs: positions of inputs that are attributes of modules. These may change before the region is
            recomputed, as batch statistics do in its own forward; `checkpoint` raises if activations change.
        reentrant: whether the model has set `use_reentrant=True`. Then nothing gets a gradient, including parameters,
            unless an activation requires one; otherwise there is no difference.
    """
    bound = frozenset(static_inputs)
    activations = [arg for i, arg in enumerate(args) if i not in bound]
    if not any(isinstance(arg, torch.Tensor) for arg in activations):  # `checkpoint` finds devices by its arguments
        bound, activations = frozenset(), list(args)
    if reentrant and not any(_is_differentiable_activation(arg) for arg in activations):
        with torch.no_grad():
            return body(*args)

    def run(*activations: Any) -> Any:
        remaining = iter(activations)
        return body(*(arg if i in bound else next(remaining) for i, arg in enumerate(args)))

    context = checkpoint_context(body)
    options: dict[str, Any] = {} if context is None else {"context_fn": context}
    return checkpoint(run, *activations, use_reentrant=False, preserve_rng_state=True, **options)


def _is_differentiable_activation(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor) and arg.requires_grad and not isinstance(arg, nn.Parameter)


def make_dry_run(gm: fx.GraphModule) -> Runnable:
    """Return a function that returns zeros of the right shapes, so that the code after a graph can be traced."""
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
