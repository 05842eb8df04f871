"""Peak rates of the GPU: a large copy, a large matrix product, and attention at a batch's shape in the best backend."""

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


def measure_ceilings(shape: Shape, batches: list[tuple[int, int]]) -> dict[str, Any]:
    """Return the rates, and the times of attention for each batch of (rows, length)."""
    found = ceilings(torch.bfloat16)
    with torch.cuda.stream(torch.cuda.Stream()):  # CUDA graphs cannot be captured on the default stream
        attention = [attention_seconds(shape, rows, length) for rows, length in batches]
    return {"bandwidth": found.bandwidth, "rate": found.rate, "attention": attention}


def attention_seconds(shape: Shape, rows: int, length: int) -> dict[str, Any]:
    """Return the seconds of one layer's causal attention, forward and backward, in the fastest backend.

    Each backend runs with grouped keys and values, and with keys and values repeated for every head in advance, since
    some backends do not support grouped-query attention.

    Raises:
        RuntimeError: if no backend supports the shape.
    """
    found = []
    for name, backend in _BACKENDS.items():
        for grouped in (True, False):
            try:
                with sdpa_kernel(backend):
                    forward, backward = _measure(shape, rows, length, grouped)
            except RuntimeError:  # the backend does not support the shape
                continue
            found.append({"backend": name, "forward": forward, "backward": backward})
    if not found:
        raise RuntimeError(
            f"no backend of scaled_dot_product_attention supports {rows} x {length} with head_dim={shape.head_dim}"
        )
    return min(found, key=lambda each: each["forward"] + each["backward"])


def _measure(shape: Shape, rows: int, length: int, grouped: bool) -> tuple[float, float]:
    kv_heads = shape.kv_heads if grouped else shape.heads
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
