"""How the norms go over their rows: the tile of a program, and the programs that sum over all rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import processors
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import cdiv, empty, power_of_two

WIDEST = 65536
"""The longest row that a program can hold in registers."""

# Measured on an H200, bfloat16, rows of 128 to 4,096 elements.
ELEMENTS = 16
"""Elements of a tile for each thread: enough to have loads in flight, and registers for several programs at a time."""
TILE, SMALL_TILE = 2048, 1024
"""The least elements of a tile; and of one of few rows, which gets more threads instead."""
FEW = 1 << 20
"""Elements up to which rows are few: what counts is how long one takes."""
STREAMED = range(1 << 22, 1 << 24)
"""Elements of which the results fit into the cache if what is read does not stay there. Fewer fit with it."""
WALKING_WARPS = 16
"""Warps on each processor where programs walk over the rows, each summing over its own."""


def plan(
    rows: int, H: int, device: torch.device, walking: bool = False, rounding: bool = False
) -> tuple[int, dict[str, Any]]:
    """How many programs to start, and the kernel's arguments that say what each does: tile, warps, and how it reads.

    `walking` programs go over the rows until all are done. `rounding` ones round each product before it is summed, as
    PyTorch does, instead of with the sum.
    """
    block_t, block_h, warps = _tile(H, rows * H < FEW and not walking)
    programs = cdiv(rows, block_t)
    if walking:
        programs = min(programs, max(1, WALKING_WARPS // warps) * processors(device))
    read = "evict_first" if rows * H in STREAMED else ""
    options = {"READ": read, "BLOCK_T": block_t, "BLOCK_H": block_h, "num_warps": warps}
    return programs, options | {"enable_fp_fusion": False} if rounding else options


@cache
def _tile(H: int, few: bool) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps."""
    block_h = power_of_two(H)
    block_t = max(1, min(16, (SMALL_TILE if few else TILE) // block_h))
    threads = block_t * block_h // ELEMENTS
    return block_t, block_h, min(16, max(1, threads // 32, 4 if few and block_t * block_h >= SMALL_TILE else 1))


def as_summed(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """`x` in the layout that PyTorch gives residual + x: a copy where it has another."""
    if x.stride() == residual.stride():
        return x
    left, right = (torch.empty_strided(t.shape, t.stride(), device="meta") for t in (residual, x))
    strides = (left + right).stride()
    if strides == torch.empty_like(x, device="meta").stride():
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def shares(programs: int, wanted: bool, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """Memory for what each program sums of a parameter's gradient, if that is wanted."""
    if parameter is None or not wanted:
        return None
    return empty(programs, parameter.shape[0], like=parameter, dtype=torch.float32)


@triton.jit
def read(ptr, mask, READ: tl.constexpr):
    """What is read once, in float32; READ is the eviction policy."""
    return tl.load(ptr, mask=mask, other=0.0, eviction_policy=READ).to(tl.float32)


@precompile.kernel(do_not_specialize=["P"])
def total_kernel(shares_ptr, total_ptr, P, H, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr):
    """The sum of P rows, for BLOCK_H columns, in an order that depends on nothing but P."""
    cols = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_H), tl.float32)
    for start in range(0, P, BLOCK_P):
        row = start + tl.arange(0, BLOCK_P)[:, None]
        total += tl.load(shares_ptr + row.to(tl.int64) * H + cols, mask=(row < P) & (cols < H), other=0.0)
    total = tl.sum(total, axis=0, keep_dims=True).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + cols, total, mask=cols < H)


def total(shares: torch.Tensor | None, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient of the parameter, from its shares."""
    if shares is None or parameter is None:
        return None
    (P, H), result = shares.shape, empty(*parameter.shape, like=parameter)
    total_kernel[(cdiv(H, 32),)](shares, result, P, H, BLOCK_P=64, BLOCK_H=32, num_warps=4)
    return result
