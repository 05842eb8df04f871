"""From a rewritten graph to something that runs: the graph itself, or Inductor's compilation of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import checkpoint

from fastlora import again, quantised
from fastlora.engine import bodies
from fastlora.kernels import ops
from fastlora.kernels.op import SemanticOp
from fastlora.metadata import hint

Runnable = Callable[..., Any]

OPS = {op.target: op for name in ops.__all__ if isinstance(op := getattr(ops, name), SemanticOp)}
"""The ops by the targets of their nodes."""


def lower(gm: fx.GraphModule, inputs: Sequence[Any], how: str, mode: str) -> Runnable:
    """Makes a rewritten graph runnable.

    Args:
        gm, inputs: the graph and the example inputs that TorchDynamo gave with it.
        how: `eager` runs the graph as it is; `inductor` compiles what no pattern covered.
        mode: Inductor's mode, e.g. `max-autotune`; without meaning for `eager`.
    """
    if how == "inductor":
        from torch._inductor.compile_fx import compile_fx

        patches = None if mode in ("default", "no-cudagraphs") else torch._inductor.list_mode_options(mode)
        compiled: Any = compile_fx(gm, list(inputs), config_patches=patches)
        return compiled
    make_arguments(gm)
    call_directly(gm)
    keep_random_state(gm)  # last, as bodies are found by the targets that change here
    return gm.forward


def make_arguments(gm: fx.GraphModule) -> None:
    """Has ops make arguments for themselves: of what is encoded everywhere, and of norms in their backward, but for
    those of checkpointed bodies, which keep nothing until that runs."""
    found = list(again.found(gm.graph, OPS))
    for body in bodies(gm):
        found += quantised.read_encoded(body.graph, OPS)
    made: dict[fx.Node, list[again.Again]] = {}
    for each in found:
        made.setdefault(each.node, []).append(each)
    for node, of_node in made.items():
        node.target = OPS[node.target].making([each.make for each in of_node])
        node.args = (*node.args, *(value for each in of_node for value in each.values))
    for body in bodies(gm):
        quantised.tidy(body.graph)


def call_directly(gm: fx.GraphModule) -> None:
    """Has a graph that runs eagerly call its ops as functions, which takes less time than through the dispatcher, and
    leaves what they save to them alone."""
    for body in bodies(gm):
        for node in body.graph.nodes:
            if node.target in OPS:
                node.target = OPS[node.target].run
        body.recompile()


def checkpoints(gm: fx.GraphModule) -> bool:
    """Whether a graph that was not lowered yet checkpoints some of it."""
    target = torch.ops.higher_order.tag_activation_checkpoint
    return any(node.target is target for body in bodies(gm) for node in body.graph.nodes)


def keep_random_state(gm: fx.GraphModule) -> None:
    """Makes checkpointed regions draw the same random numbers again when they are recomputed.

    Run eagerly, `tag_activation_checkpoint` calls `checkpoint(..., preserve_rng_state=False)`, which leaves that to
    AOTAutograd: a recomputed dropout would have another mask, and the gradients would be wrong without any error.
    """
    for body in list(bodies(gm)):  # all of them first, since they are found by the targets that change here
        for node in body.graph.nodes:
            if node.target is torch.ops.higher_order.tag_activation_checkpoint:
                node.target = run_checkpointed
                context = node.meta.get("_checkpoint_context_fn")
                node.kwargs = {"context_fn": context} if context is not None else {}
        body.recompile()


def run_checkpointed(body: Runnable, *args: Any, **kwargs: Any) -> Any:
    """A checkpointed region of a graph that runs eagerly."""
    return checkpoint(body, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)


def pretend(gm: fx.GraphModule) -> Runnable:
    """A stand-in that computes nothing: zeros of the right shapes, so that tracing can go on past the graph."""
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
