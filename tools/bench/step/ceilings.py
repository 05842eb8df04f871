"""What this GPU reaches: a large copy, a large product, and attention at a batch's shape with its best backend."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fastlora.tools.bench.measure import ceilings, device_time
from fastlora.tools.bench.shapes import Shape

_BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def measured(shape: Shape, batches: list[tuple[int, int]]) -> dict[str, Any]:
    """Rates, and seconds of attention for each batch of (rows, length)."""
    found = ceilings(torch.bfloat16)
    with torch.cuda.stream(torch.cuda.Stream()):  # nothing can be captured on the default one
        attention = [attention_seconds(shape, rows, length) for rows, length in batches]
    return {"bandwidth": found.bandwidth, "rate": found.rate, "attention": attention}


def attention_seconds(shape: Shape, rows: int, length: int) -> dict[str, Any]:
    """Seconds of one layer's causal attention, forward and backward, where they are least together.

    Keys and values are taken both as they are and repeated beforehand for every head, as some backends cannot share
    them.
    """
    found = []
    for name, backend in _BACKENDS.items():
        for shared in (True, False):
            try:
                with sdpa_kernel(backend):
                    forward, backward = _measure(shape, rows, length, shared)
            except RuntimeError:  # this backend has no kernel for the shape
                continue
            found.append({"backend": name, "forward": forward, "backward": backward})
    if not found:
        raise RuntimeError(f"no backend of attention runs at {rows} x {length} with heads of {shape.head_dim}")
    return min(found, key=lambda each: each["forward"] + each["backward"])


def _measure(shape: Shape, rows: int, length: int, shared: bool) -> tuple[float, float]:
    kv_heads = shape.kv_heads if shared else shape.heads
    q, k, v = (
        torch.randn(rows, heads, length, shape.head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (shape.heads, kv_heads, kv_heads)
    )
    run = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=kv_heads != shape.heads)
    out = run()
    gradient = torch.randn_like(out)
    forward = device_time([run])
    backward = device_time([lambda: torch.autograd.grad(out, (q, k, v), gradient, retain_graph=True)])
    return forward, backward
