"""What a graph will launch, so that its kernels can be compiled before it runs."""

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


def calls(gm: fx.GraphModule) -> Iterator[Call]:
    """The calls of ops in a rewritten graph, as they are, and as they are where activations want gradients: the first
    of several blocks has an input that wants none, but the kernels for the others are wanted just after."""
    for each in recomputable_arguments(gm.graph):
        if all(meta(value) is not None for value in each.values if isinstance(value, fx.Node)):
            values = fx.node.map_aggregate(each.values, _without_memory)
            source = each.argument.source
            yield Call(source, values, [False] * len(source.leaves.flat(values)))
    for body in bodies(gm):
        for node in body.graph.nodes:
            op = REGISTERED.get(node.target)
            if op is not None and all(meta(source) is not None for source in node.all_input_nodes):
                yield from _calls(op, node)


def _calls(op: SemanticOp, node: fx.Node) -> Iterator[Call]:
    examples = [meta(leaf) for leaf in op.leaves.flat(node.args)]
    values = fx.node.map_aggregate(node.args, _without_memory)
    needs = [t is not None and t.requires_grad for t in examples]
    yield Call(op, values, needs)
    more = [
        need or (t is not None and t.is_floating_point() and not isinstance(t, nn.Parameter))
        for need, t in zip(needs, examples, strict=True)
    ]
    if more != needs:
        yield Call(op, values, more)


def _without_memory(value: Any) -> Any:
    if not isinstance(value, fx.Node):
        return hint(value)
    example = meta(value)
    assert example is not None
    shape, strides = ([hint(size) for size in sizes] for sizes in (example.shape, example.stride()))
    return torch.empty_strided(shape, strides, dtype=example.dtype, device="meta")


def loss_call(gm: fx.GraphModule, head: nn.Linear) -> Call | None:
    """The loss that the head's deferred logits are likely to meet: a mean over as many tokens as leave this graph, if
    what leaves it looks like hidden states."""
    outputs = next(iter(reversed(gm.graph.nodes))).args[0]
    found = [t for node in outputs if (t := meta(node)) is not None and t.shape[-1:] == (head.in_features,)]
    if not found or not found[0].is_floating_point():
        return None
    tokens, device = 1, found[0].device.type
    for size in found[0].shape[:-1]:
        tokens *= hint(size)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else found[0].dtype

    def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    x, labels = empty(tokens, head.in_features, dtype=found[0].dtype), empty(tokens, dtype=torch.int64)
    weight = empty(*head.weight.shape, dtype=head.weight.dtype)
    bias = None if head.bias is None else empty(*head.bias.shape, dtype=head.bias.dtype)
    values = linear_cross_entropy.order({
        "x": x, "weight": weight, "bias": bias, "labels": labels, "scale": 1.0, "softcap": 0.0, "ignore_index": -100,
        "reduction": "mean", "label_smoothing": 0.0, "z_loss": 0.0, "base_dtype": dtype, "logits_dtype": torch.float32,
    })  # fmt: skip
    trained = {id(x): True, id(weight): head.weight.requires_grad}
    needs = [trained.get(id(t), False) for t in linear_cross_entropy.leaves.flat(values)]
    return Call(linear_cross_entropy, values, needs)
