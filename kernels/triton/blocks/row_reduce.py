"""Launch planning for the norm kernels, and their reduction over rows for parameter gradients."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import processors
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import cdiv, empty, power_of_two

MAX_H = 65536
"""The longest row that a program can hold in registers."""

# Measured on an H200, bfloat16, rows of 128 to 4,096 elements.
ELEMENTS = 16
"""Elements per thread: enough loads in flight, with registers left for several resident programs."""
TILE, SMALL_TILE = 2048, 1024
"""The minimum elements of a tile, in general and for small inputs, which use more threads instead."""
SMALL = 1 << 20
"""Elements up to which an input is small, and bound by latency."""
STREAMED = range(1 << 22, 1 << 24)
"""Elements of inputs whose results fit into the L2 cache only if the inputs are evicted first."""
PERSISTENT_WARPS = 16
"""Warps per streaming multiprocessor of persistent programs."""


def plan(
    rows: int, H: int, device: torch.device, persistent: bool = False, fp_fusion: bool = True
) -> tuple[int, dict[str, Any]]:
    """Return the number of programs, and the kernel's constants and launch options.

    Args:
        rows, H: the shape of the input.
        device: where it is.
        persistent: each program loops over rows, so that it can sum over them in registers.
        fp_fusion: whether products and sums may be contracted to FMAs; without, products are rounded as in PyTorch.
    """
    block_t, block_h, warps = _tile(H, rows * H < SMALL and not persistent)
    programs = cdiv(rows, block_t)
    if persistent:
        programs = min(programs, max(1, PERSISTENT_WARPS // warps) * processors(device))
    eviction = "evict_first" if rows * H in STREAMED else ""
    options = {"EVICTION": eviction, "BLOCK_T": block_t, "BLOCK_H": block_h, "num_warps": warps}
    return programs, options if fp_fusion else options | {"enable_fp_fusion": False}


@cache
def _tile(H: int, small: bool) -> tuple[int, int, int]:
    """Return BLOCK_T, BLOCK_H and the number of warps."""
    block_h = power_of_two(H)
    block_t = max(1, min(16, (SMALL_TILE if small else TILE) // block_h))
    threads = block_t * block_h // ELEMENTS
    return block_t, block_h, min(16, max(1, threads // 32, 4 if small and block_t * block_h >= SMALL_TILE else 1))


def with_strides_of_sum(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """Return `x` with the strides of `residual + x`, copied if it has others."""
    if x.stride() == residual.stride():
        return x
    left, right = (torch.empty_strided(t.shape, t.stride(), device="meta") for t in (residual, x))
    strides = (left + right).stride()
    if strides == torch.empty_like(x, device="meta").stride():
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def allocate_partials(programs: int, needed: bool, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """Return memory (programs, H) for the partial sums of a parameter's gradient in float32, None if not needed."""
    if parameter is None or not needed:
        return None
    return empty(programs, parameter.shape[0], like=parameter, dtype=torch.float32)


@triton.jit
def load_float32(ptr, mask, EVICTION: tl.constexpr):
    return tl.load(ptr, mask=mask, other=0.0, eviction_policy=EVICTION).to(tl.float32)


@precompile.kernel(do_not_specialize=["P"])
def reduce_partials_kernel(partials_ptr, total_ptr, P, H, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr):
    """total (H,) = the sum of P rows, for BLOCK_H columns, in an order that depends only on P."""
    cols = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_H), tl.float32)
    for start in range(0, P, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)[:, None]
        total += tl.load(partials_ptr + row.to(tl.int64) * H + cols, mask=(row < P) & (cols < H), other=0.0)
    total = tl.sum(total, axis=0, keep_dims=True).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + cols, total, mask=cols < H)


def reduce_partials(partials: torch.Tensor | None, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """Return the gradient of the parameter, in its dtype, from partial sums (P, H); None for None."""
    if partials is None or parameter is None:
        return None
    (P, H), result = partials.shape, empty(*parameter.shape, like=parameter)
    reduce_partials_kernel[(cdiv(H, 32),)](partials, result, P, H, BLOCK_P=64, BLOCK_H=32, num_warps=4)
    return result
