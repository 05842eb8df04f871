"""The least seconds of a LoRA step: every part of it at the ceiling of its kind, one after the other.

Products run at the rate of a large cuBLAS product, memory-bound ops at the bandwidth of a large copy with each byte
counted once, attention as fast as its best backend at this very shape. The work is that of the ops' own cost formulas:
frozen weights have no gradient, the input of the first layer needs none, logits are never written, and nothing is
computed twice. Attention counts as causal over the whole length, also where a model slides a window over it.
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
"""Of quantised weights; their scales are a byte each."""
_ADAMW_BYTES = 7 * 4
"""Per trained float32 weight: weight, gradient and two moments read, weight and moments written."""


@dataclass(frozen=True)
class Part:
    """One kind of work in a step: so many times so many operations and bytes."""

    name: str
    times: int
    flops: float
    moved: float

    def seconds(self, ceilings: Ceilings) -> float:
        return self.times * ceilings.limit(self.flops, self.moved)


def limit(
    model: Model, layers: int, rows: int, length: int, measured: dict[str, Any], quantised: bool = False
) -> dict[str, Any]:
    """Seconds of a step at the ceilings that were measured, in total and by part."""
    found = Ceilings(measured["bandwidth"], measured["rate"])
    index = measured["batches"].index([rows, length])
    attention = measured["attention"][index]
    seconds = {"attention": layers * (attention["forward"] + attention["backward"])}
    for part in parts(model, layers, rows * length, quantised):
        seconds[part.name] = seconds.get(part.name, 0.0) + part.seconds(found)
    return {"seconds": sum(seconds.values()), "parts": seconds, "attention_backend": attention["backend"]}


def parts(model: Model, layers: int, tokens: int, quantised: bool = False) -> Iterator[Part]:
    """All work of a step but attention. Quantised weights are decoded once forward and once backward."""
    yield from _products(model, layers, tokens)
    yield from _norms(model, layers, tokens)
    shape = model.shape
    heads = {"T": tokens, "M": shape.heads + shape.kv_heads, "D": shape.head_dim}
    head = {"T": tokens, "H": shape.hidden, "V": shape.vocabulary}
    yield from _both(ops.rotary_group, "rotary", layers, heads)
    yield from _both(ops.glu, "GLU", layers, {"T": tokens, "I": shape.intermediate})
    yield from _both(ops.linear_cross_entropy, "head and loss", 1, head)
    for name, widths, K in _linears(model) if quantised else ():
        sizes = {"N": sum(widths), "K": K, "S": _BLOCKSIZE}
        yield _part(ops.dequantize_4bit, "forward", f"{name} decoded", 2 * layers, sizes)
    yield Part("embedding", 1, 0, 2 * tokens * shape.hidden * _DTYPE.itemsize)
    yield Part("optimizer", 1, 0, _ADAMW_BYTES * trained_weights(model, layers))


def trained_weights(model: Model, layers: int) -> int:
    """The elements of all adapters."""
    return layers * sum(RANK * (sum(widths) + len(widths) * K) for _, widths, K in _linears(model))


def _linears(model: Model) -> list[tuple[str, list[int], int]]:
    """The linear layers of a block that share an input: name, widths of their outputs, width of the input."""
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
    # The first layer's input is the embedding, which is frozen: its gradient is not needed.
    _, widths, K = _linears(model)[0]
    spared = 2 * tokens * (sum(widths) * K + RANK * len(widths) * K)
    yield Part("q, k, v backward", -1, spared, 0)


def _norms(model: Model, layers: int, tokens: int) -> Iterator[Part]:
    """Each norm in front is one with the addition before it, but for the first, which has nothing to hand back to."""
    shape = model.shape
    sizes = {"T": tokens, "H": shape.hidden}
    yield _part(ops.rms_norm, "forward", "norms", 1, sizes)
    yield from _both(ops.add_rms_norm, "norms", 2 * layers, sizes)
    if model.sandwich:
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
