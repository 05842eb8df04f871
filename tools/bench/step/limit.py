"""The least time of a LoRA step: the sum of its parts, each at the peak rate of its kind.

Matrix products run at the rate of a large cuBLAS product, memory-bound ops at the bandwidth of a large copy with each
byte counted once, and attention in its best backend at the same shape. The work is that of the ops' cost formulas:
frozen weights and the input of the first layer have no gradient, logits are never materialized, and nothing is
recomputed. Attention is causal over the whole length, also for models with sliding windows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastlora.kernels import ops
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.tools.bench.measure import Ceilings
from fastlora.tools.bench.step.models import Model
from fastlora.tools.bench.step.weights import RANK

_DTYPE = torch.bfloat16
_BLOCKSIZE = 64
"""Block size of quantized weights; a scale takes one byte."""
_ADAMW_BYTES = 7 * 4
"""Per trained float32 weight: reads of weight, gradient and two moments, writes of weight and moments."""


@dataclass(frozen=True)
class Part:
    """One kind of work in a step, which occurs several times.

    Attributes:
        times: how often it occurs; negative for work that others count but that is not needed.
        flops, num_bytes: of one occurrence.
    """

    name: str
    times: int
    flops: float
    num_bytes: float

    def seconds(self, ceilings: Ceilings) -> float:
        return self.times * ceilings.limit(self.flops, self.num_bytes)


def limit(
    model: Model, layers: int, rows: int, length: int, measured: dict[str, Any], quantized: bool = False
) -> dict[str, Any]:
    """Return the least seconds of a step, in total and by part, at the measured peak rates."""
    ceilings = Ceilings(measured["bandwidth"], measured["rate"])
    index = measured["batches"].index([rows, length])
    attention = measured["attention"][index]
    seconds = {"attention": layers * (attention["forward"] + attention["backward"])}
    for part in parts(model, layers, rows * length, quantized):
        seconds[part.name] = seconds.get(part.name, 0.0) + part.seconds(ceilings)
    return {"seconds": sum(seconds.values()), "parts": seconds, "attention_backend": attention["backend"]}


def parts(model: Model, layers: int, tokens: int, quantized: bool = False) -> Iterator[Part]:
    """Yield all work of a step except attention. Quantized weights are dequantized in both passes."""
    yield from _products(model, layers, tokens)
    yield from _norms(model, layers, tokens)
    shape = model.shape
    heads = {"T": tokens, "M": shape.heads + shape.kv_heads, "D": shape.head_dim}
    head = {"T": tokens, "H": shape.hidden, "V": shape.vocabulary}
    yield from _both(ops.rotary_group, "rotary", layers, heads)
    yield from _both(ops.glu, "GLU", layers, {"T": tokens, "I": shape.intermediate})
    yield from _both(ops.linear_cross_entropy, "head and loss", 1, head)
    for name, widths, K in _linears(model) if quantized else ():
        sizes = {"N": sum(widths), "K": K, "S": _BLOCKSIZE}
        yield _part(ops.dequantize_4bit, "forward", f"{name} decoded", 2 * layers, sizes)
    yield Part("embedding", 1, 0, 2 * tokens * shape.hidden * _DTYPE.itemsize)
    yield Part("optimizer", 1, 0, _ADAMW_BYTES * num_trained_weights(model, layers))


def num_trained_weights(model: Model, layers: int) -> int:
    """Return the number of elements of all adapters."""
    return layers * sum(RANK * (sum(widths) + len(widths) * K) for _, widths, K in _linears(model))


def _linears(model: Model) -> list[tuple[str, list[int], int]]:
    """Return the groups of linear layers of a block that share an input: name, output widths, and input width."""
    shape = model.shape
    hidden, inner = shape.hidden, shape.intermediate
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return [
        ("q, k, v", [q, kv, kv], hidden),
        ("o", [hidden], q),
        ("gate, up", [inner, inner], hidden),
        ("down", [hidden], inner),
    ]


def _products(model: Model, layers: int, tokens: int) -> Iterator[Part]:
    for name, widths, K in _linears(model):
        sizes = {"T": tokens, "N": sum(widths), "K": K, "R": RANK, "M": len(widths)}
        yield _part(ops.lora_group, "forward", f"{name} forward", layers, sizes)
        yield _part(ops.lora_group, "backward", f"{name} backward", layers, sizes)
    # The input of the first layer is the output of the frozen embedding, and needs no gradient.
    _, widths, K = _linears(model)[0]
    unneeded_flops = 2 * tokens * (sum(widths) * K + RANK * len(widths) * K)
    yield Part("q, k, v backward", -1, unneeded_flops, 0)


def _norms(model: Model, layers: int, tokens: int) -> Iterator[Part]:
    """Each norm before attention or MLP is fused with the preceding residual addition, except the first, which has none
    and needs no backward."""
    shape = model.shape
    sizes = {"T": tokens, "H": shape.hidden}
    yield _part(ops.rms_norm, "forward", "norms", 1, sizes)
    yield from _both(ops.add_rms_norm, "norms", 2 * layers, sizes)
    if model.post_norms:
        yield from _both(ops.rms_norm, "norms", 2 * layers, sizes)
    if model.head_norms:
        heads = {"T": tokens * (shape.heads + shape.kv_heads), "H": shape.head_dim}
        yield from _both(ops.rms_norm, "norms", layers, heads)


def _both(op: SemanticOp, name: str, times: int, sizes: dict[str, int]) -> Iterator[Part]:
    for direction in ("forward", "backward"):
        yield _part(op, direction, name, times, sizes)


def _part(op: SemanticOp, direction: str, name: str, times: int, sizes: dict[str, int]) -> Part:
    assert op.cost is not None
    elements = {"b": _DTYPE.itemsize, "w": _DTYPE.itemsize, "p": 4, "S": 0}
    return Part(name, times, *getattr(op.cost, direction).at({**elements, **sizes}))
