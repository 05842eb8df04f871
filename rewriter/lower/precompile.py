"""Finding the op calls of a graph, so that its kernels can be compiled before it runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from fastlora.graph.bodies import bodies
from fastlora.graph.fake_values import hint, meta
from fastlora.kernels.core.execution import Call
from fastlora.kernels.core.library import REGISTERED
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.kernels.ops import linear_cross_entropy
from fastlora.lower.rematerialize import recomputable_arguments


def op_calls(gm: fx.GraphModule) -> Iterator[Call]:
    """Yield the calls of ops in a rewritten graph, on meta tensors.

    Each is yielded as it is, and if activations require no gradient, also with gradients for them: the input of the
    first of several blocks requires none, but those of the next blocks, which share the graph, do.
    """
    for each in recomputable_arguments(gm.graph):
        if all(meta(value) is not None for value in each.values if isinstance(value, fx.Node)):
            values = fx.node.map_aggregate(each.values, _on_meta)
            source = each.argument.source
            yield Call(source, values, [False] * len(source.leaves.flat(values)))
    for body in bodies(gm):
        for node in body.graph.nodes:
            op = REGISTERED.get(node.target)
            if op is not None and all(meta(source) is not None for source in node.all_input_nodes):
                yield from _calls_of_node(op, node)


def _calls_of_node(op: SemanticOp, node: fx.Node) -> Iterator[Call]:
    examples = [meta(leaf) for leaf in op.leaves.flat(node.args)]
    values = fx.node.map_aggregate(node.args, _on_meta)
    needs = [t is not None and t.requires_grad for t in examples]
    yield Call(op, values, needs)
    with_activations = [
        need or (t is not None and t.is_floating_point() and not isinstance(t, nn.Parameter))
        for need, t in zip(needs, examples, strict=True)
    ]
    if with_activations != needs:
        yield Call(op, values, with_activations)


def _on_meta(value: Any) -> Any:
    if not isinstance(value, fx.Node):
        return hint(value)
    example = meta(value)
    assert example is not None
    shape, strides = ([hint(size) for size in sizes] for sizes in (example.shape, example.stride()))
    return torch.empty_strided(shape, strides, dtype=example.dtype, device="meta")


def loss_call(gm: fx.GraphModule, head: nn.Linear) -> Call | None:
    """Return the likely call of the loss on the head's deferred logits, None if the graph does not return hidden
    states.

    The loss is assumed to be a mean over all tokens of the hidden states that the graph returns.
    """
    outputs = next(iter(reversed(gm.graph.nodes))).args[0]
    hidden = next(
        (t for node in outputs if (t := meta(node)) is not None and t.shape[-1:] == (head.in_features,)), None
    )
    if hidden is None or not hidden.is_floating_point():
        return None
    tokens, device = 1, hidden.device.type
    for size in hidden.shape[:-1]:
        tokens *= hint(size)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, labels = empty(tokens, head.in_features, dtype=hidden.dtype), empty(tokens, dtype=torch.int64)
    weight = empty(*head.weight.shape, dtype=head.weight.dtype)
    bias = None if head.bias is None else empty(*head.bias.shape, dtype=head.bias.dtype)
    values = linear_cross_entropy.order({
        "x": x, "weight": weight, "bias": bias, "labels": labels, "scale": 1.0, "softcap": 0.0, "ignore_index": -100,
        "reduction": "mean", "label_smoothing": 0.0, "z_loss": 0.0, "base_dtype": dtype, "logits_dtype": torch.float32,
    })  # fmt: skip
    requires_grad = {id(x): True, id(weight): head.weight.requires_grad}
    needs = [requires_grad.get(id(t), False) for t in linear_cross_entropy.leaves.flat(values)]
    return Call(linear_cross_entropy, values, needs)
