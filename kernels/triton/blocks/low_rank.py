"""The thin products of a LoRA layer, each one pass over the activation that it reads.

    down          xa  = s * x A^T                           x (T, K), A (R, K) -> (T, R)
    up_gradients  dxa = s * dy B,  dB = dy^T xa             dy (T, N), B (N, R) -> (T, R), (N, R)
    down_gradient dA  = dxa^T x                             dxa (T, R), x (T, K) -> (R, K)

They are bound by memory: the arithmetic on a row of R <= 256 hides behind the load of x or dy.  Two kernels do all of
it.  `rows_kernel` sums along rows: xa, dxa.  `columns_kernel` sums down columns: dA, dB; while it holds a tile of dy it
also multiplies it by B, so one pass yields dxa and dB.  What several programs sum goes to memory in float32, one share
per program, and `reduce_kernel` adds the shares in a fixed order: no atomics, so two runs give equal bits.

The scaling belongs in xa and in dxa: then y = xa B^T + x W^T, dx = dxa A + dy W, dB and dA need no other factor, and
there is one rounding where eager has two, of xa and of s times the product.

Each function takes any operands: where the kernels cannot read them, or were measured to be slower, it is cuBLAS.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import HALVES, processors
from fastlora.kernels.triton.blocks.matmul import describable, describe, measured
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import allocate, cdiv, power_of_two

REDUCED = 256
"""Elements that a program of `reduce_kernel` sums."""
SHARED_MEMORY = 220_000
LARGE = 2**24
"""Elements of x or dy from which on one pass at full bandwidth beats cuBLAS; below, launches are what takes time."""
WIDEST_BOTH = 32
"""The widest block of ranks for which one pass for dxa and dB beats two: their shares grow with the rank."""


class Sweep(NamedTuple):
    """How a program walks over the large operand: its tile, rows by columns, and the kernel's options."""

    rows: int
    cols: int
    warps: int
    stages: int


ROWS = Sweep(64, 128, warps=4, stages=6)
COLUMNS = Sweep(64, 128, warps=4, stages=6)
BOTH = Sweep(64, 256, warps=4, stages=4)
BOTH_WIDE = Sweep(64, 512, warps=4, stages=3)
"""Measured on an H200. For many columns, if a rank up to 16 leaves registers for 512: half as many shares of dxa."""


@precompile.kernel(do_not_specialize=["T", "scaling", "SHARE", "share_stride"])
def rows_kernel(
    x, factor, out_ptr, scaling, T, K, R, factor_stride, SHARE, share_stride, out_stride,
    FACTOR_T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out (T, R) = scaling * x (T, K) @ factor (K, R) over SHARE of the K summed elements.

    Programs: (blocks of rows, shares). FACTOR_T: the factor lies in memory as (R, K), and is a descriptor; else a
    pointer, as the copy engine is slow at rows this short.
    """
    t = tl.program_id(0) * BLOCK_T
    begin = tl.program_id(1) * SHARE
    end = min(begin + SHARE, K)
    r = tl.arange(0, BLOCK_R)[None, :]
    acc = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for k in tl.range(begin, end, BLOCK_K):
        if FACTOR_T:
            a = factor.load([0, k]).T
        else:
            row = (k + tl.arange(0, BLOCK_K))[:, None].to(tl.int64)
            a = tl.load(factor + row * factor_stride + r, mask=(row < K) & (r < R), other=0.0)
        acc = tl.dot(x.load([t, k]), a, acc)
    row = (t + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
    out_ptr += tl.program_id(1).to(tl.int64) * share_stride + row * out_stride + r
    tl.store(out_ptr, (acc * scaling).to(out_ptr.dtype.element_ty), mask=(row < T) & (r < R))


@precompile.kernel(do_not_specialize=["T", "scaling", "SHARE", "share_stride"])
def columns_kernel(
    x, thin_ptr, columns_ptr, factor_ptr, rows_ptr, scaling, T, C, R,
    thin_stride, column_stride, r_stride, share_stride, factor_stride, factor_r_stride, SHARE,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """columns (C, R) = x (T, C)^T @ thin (T, R) over SHARE of the rows; rows (T, R) = scaling * x @ factor (C, R) over
    the program's BLOCK_C columns, if a factor is given.

    Programs: (blocks of columns, shares). The columns' sums have a share per program_id(1), the rows' per
    program_id(0).
    """
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
    r = tl.arange(0, BLOCK_R)[None, :]
    begin = tl.program_id(1) * SHARE
    end = min(begin + SHARE, T)
    acc = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    if factor_ptr is not None:
        factor_mask = (c < C) & (r < R)
        factor = tl.load(factor_ptr + c * factor_stride + r * factor_r_stride, mask=factor_mask, other=0.0).to(x.dtype)
        rows_ptr += tl.program_id(0).to(tl.int64) * T * R
    for t in tl.range(begin, end, BLOCK_T):
        tile = x.load([t, tl.program_id(0) * BLOCK_C])
        rows = (t + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
        mask = (rows < end) & (r < R)
        thin = tl.load(thin_ptr + rows * thin_stride + r, mask=mask, other=0.0)
        acc = tl.dot(tile.T, thin, acc)
        if factor_ptr is not None:
            tl.store(rows_ptr + rows * R + r, tl.dot(tile, factor) * scaling, mask=mask)
    columns_ptr += tl.program_id(1).to(tl.int64) * share_stride
    tl.store(
        columns_ptr + c * column_stride + r * r_stride, acc.to(columns_ptr.dtype.element_ty), mask=(c < C) & (r < R)
    )


@triton.jit
def _add_shares(shares_ptr, out_ptr, block, count, size, width, stride, BLOCK: tl.constexpr, SHARES: tl.constexpr):
    i = block * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, count, SHARES, num_stages=1):  # all loads of a step in flight: this is all latency
        share = first + tl.arange(0, SHARES)[:, None]
        mask = (share < count) & (i < size)[None, :]
        acc += tl.sum(tl.load(shares_ptr + share.to(tl.int64) * size + i[None, :], mask=mask, other=0.0), axis=0)
    tl.store(out_ptr + (i // width).to(tl.int64) * stride + i % width, acc.to(out_ptr.dtype.element_ty), mask=i < size)


@precompile.kernel(do_not_specialize=["count0", "count1"])
def reduce_kernel(
    shares0_ptr, out0_ptr, count0, size0, width0, stride0, shares1_ptr, out1_ptr, count1, size1, width1, stride1,
    BLOCK: tl.constexpr, SHARES: tl.constexpr,
):  # fmt: skip
    """out = the sum over count shares of size elements, rounded; a second such sum in the same launch if given.
    Rows of `out` have width elements and lie stride apart."""
    first = tl.cdiv(size0, BLOCK)
    block = tl.program_id(0)
    if block < first:
        _add_shares(shares0_ptr, out0_ptr, block, count0, size0, width0, stride0, BLOCK, SHARES)
    elif shares1_ptr is not None:
        _add_shares(shares1_ptr, out1_ptr, block - first, count1, size1, width1, stride1, BLOCK, SHARES)


def reduce(*sums: tuple[torch.Tensor, torch.Tensor]) -> None:
    """For one or two (shares, out), in one launch: out = shares.sum(0)."""
    args: list[object] = []
    blocks = 0
    for shares, out in sums:
        args += [shares, out, shares.shape[0], out.numel(), out.shape[1], out.stride(0)]
        blocks += cdiv(out.numel(), REDUCED)
    if len(sums) == 1:
        args += [None, None, 0, 0, 1, 1]
    reduce_kernel[(blocks,)](*args, BLOCK=REDUCED, SHARES=16, num_warps=4)


def in_shares(blocks: int, size: int, step: int, programs: int, steps: int = 4) -> tuple[int, int]:
    """Into how many shares to cut the summed `size`, and a share's size: as many as give blocks * shares no more than
    `programs`, none of fewer than `steps` steps."""
    count = max(1, min(size // (steps * step), programs // blocks))
    share = cdiv(cdiv(size, count), step) * step
    return cdiv(size, share), share


def block_of(R: int) -> int:
    """The narrowest block for a dimension of a product that is as small as R."""
    return max(16, power_of_two(R))


def _stages(sweep: Sweep, thin: int, held: int = 0) -> int:
    """As many stages as fit into shared memory beside `held` bytes, each a tile and `thin` bytes."""
    return max(2, min(sweep.stages, (SHARED_MEMORY - held) // (sweep.rows * sweep.cols * 2 + thin)))


def sum_rows(
    x: torch.Tensor, factor: torch.Tensor, scaling: float, out: torch.Tensor, sweep: Sweep = ROWS
) -> torch.Tensor:
    """out (T, R) = scaling * x (T, K) @ factor (K, R)."""
    (T, K), R = x.shape, factor.shape[1]
    block, transposed = block_of(R), factor.stride(1) != 1
    strips = cdiv(T, sweep.rows)
    count, share = in_shares(strips, K, sweep.cols, processors(x.device))
    target = out if count == 1 else allocate((count, T, R), torch.float32, x.device)
    rows_kernel[(strips, count)](
        describe(x, sweep.rows, sweep.cols), describe(factor.t(), block, sweep.cols) if transposed else factor, target,
        scaling, T, K, R, factor.stride(0), share, target.stride(0), target.stride(-2), transposed,
        sweep.rows, sweep.cols, block,
        num_warps=sweep.warps, num_stages=_stages(sweep, 2 * sweep.cols * block),
    )  # fmt: skip
    if count > 1:
        reduce((target, out))
    return out


def sum_columns(
    x: torch.Tensor, thin: torch.Tensor, out: torch.Tensor, sweep: Sweep = COLUMNS,
    factor: torch.Tensor | None = None, scaling: float = 1.0, rows: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """out (C, R) = x (T, C)^T @ thin (T, R); and rows (T, R) = scaling * x @ factor (C, R), if these are given.
    `out` or its transpose is contiguous."""
    (T, C), R = x.shape, thin.shape[1]
    block = block_of(R)
    held = 0 if factor is None else 2 * sweep.cols * block
    strips = cdiv(C, sweep.cols)
    count, share = in_shares(strips, T, sweep.rows, processors(x.device))
    shares = out.unsqueeze(0)
    if count > 1:
        shares = allocate((count, C * R), torch.float32, x.device)
        shares = shares.view(count, C, R) if out.stride(1) == 1 else shares.view(count, R, C).transpose(1, 2)
    row_shares = None if factor is None else allocate((strips, T, R), torch.float32, x.device)
    columns_kernel[(strips, count)](
        describe(x, sweep.rows, sweep.cols), thin, shares, factor, row_shares, scaling, T, C, R,
        thin.stride(0), shares.stride(1), shares.stride(2), C * R, *((0, 0) if factor is None else factor.stride()),
        share, BLOCK_T=sweep.rows, BLOCK_C=sweep.cols, BLOCK_R=block,
        num_warps=sweep.warps, num_stages=_stages(sweep, 2 * sweep.rows * block, held),
    )  # fmt: skip
    sums = [] if row_shares is None or rows is None else [(row_shares, rows)]
    if count > 1:
        sums.append((shares, out) if out.stride(1) == 1 else (shares, out.t()))
    if sums:
        reduce(*sums)


def down(
    x: torch.Tensor, factors: Sequence[torch.Tensor], scaling: float = 1.0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """xa (T, sum of R) in x's dtype = scaling * x (T, K) @ A^T for each A (R, K), the members' xa side by side.
    A caller who keeps the members' A stacked, rounded to x's dtype, saves a launch or two."""
    if out is None:
        out = allocate((x.shape[0], sum(a.shape[0] for a in factors)), x.dtype, x.device)
    a = (factors[0] if len(factors) == 1 else torch.cat(list(factors))).to(x.dtype)
    if _by_rows(x, a.shape[0]) and a.stride(1) == 1 and describable(a):
        return sum_rows(x, a.t(), scaling, out)
    return _product_into(out, x, a.t(), scaling)


def up_gradients(
    dy: torch.Tensor,
    lora_b: torch.Tensor,
    xa: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
    wants: tuple[bool, bool] = (True, True),
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dxa (T, R) in dy's dtype = scaling * dy (T, N) @ B (N, R), and dB (N, R) in `dtype` = dy^T @ xa (T, R), each if
    wanted. xa holds its scaling already, as `down` gives it. `out`, for dxa, may be some columns of a wider matrix."""
    (T, R), block = xa.shape, block_of(xa.shape[1])
    dxa = None
    if wants[0]:
        dxa = allocate((T, R), dy.dtype, dy.device) if out is None else out
    sweeps = _sweeps(dy) and xa.dtype == dy.dtype and xa.stride(1) == 1
    if dxa is not None and wants[1] and sweeps and block <= WIDEST_BOTH and dy.numel() >= LARGE // 8:
        db = allocate((dy.shape[1], R), dtype, dy.device)
        wide = block == 16 and dy.shape[1] >= 8192
        sum_columns(dy, xa, db, BOTH_WIDE if wide else BOTH, lora_b, scaling, dxa)
        return dxa, db
    if dxa is not None:
        b = lora_b.to(dy.dtype)
        if _by_rows(dy, R) and b.stride(1) == 1:
            sum_rows(dy, b, scaling, dxa)
        else:
            _product_into(dxa, dy, b, scaling)
    return dxa, _gradient(dy, xa, dtype) if wants[1] else None


def down_gradient(dxa: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dA (R, K) in `dtype` = dxa (T, R)^T @ x (T, K); the rows of several members if dxa holds them side by side."""
    if not _by_columns(x, dxa):
        return _gradient_by_library(dxa.t(), x, dtype)
    out = allocate((dxa.shape[1], x.shape[1]), dtype, x.device)
    sum_columns(x, dxa, out.t())
    return out


def _gradient(dy: torch.Tensor, xa: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """dy (T, N)^T @ xa (T, R) in `dtype`."""
    if not _by_columns(dy, xa):
        return _gradient_by_library(dy.t(), xa, dtype)
    out = allocate((dy.shape[1], xa.shape[1]), dtype, dy.device)
    sum_columns(dy, xa, out)
    return out


def _gradient_by_library(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.float32 and left.dtype == right.dtype and left.dtype in HALVES:
        return wide_product(left, right)
    return (left @ right).to(dtype)


def wide_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in float32, of operands of 16 bits; by cuBLAS, but for Triton's interpreter."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left.float() @ right.float()


def _product_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """out = scaling * left @ right, rounded once."""
    return torch.addmm(out, left, right, beta=0, alpha=scaling, out=out)


def _sweeps(x: torch.Tensor) -> bool:
    """Whether the kernels can walk over x, on a GPU where they were measured."""
    return x.dtype in HALVES and x.stride(1) == 1 and describable(x) and measured(x.device)


def _by_rows(x: torch.Tensor, R: int) -> bool:
    """Whether `sum_rows` can take x and was faster than cuBLAS: one pass whose waves are full."""
    if R > 64 or x.numel() < LARGE or not _sweeps(x):
        return False
    programs, blocks = processors(x.device), cdiv(x.shape[0], ROWS.rows)
    blocks *= max(1, programs // blocks)
    return blocks >= 0.9 * programs * cdiv(blocks, programs)


def _by_columns(x: torch.Tensor, thin: torch.Tensor) -> bool:
    """Whether `sum_columns` can take x^T @ thin and was faster than cuBLAS."""
    fits = thin.shape[1] <= 32 and x.numel() >= LARGE and thin.dtype == x.dtype and thin.stride(1) == 1
    return fits and _sweeps(x)
