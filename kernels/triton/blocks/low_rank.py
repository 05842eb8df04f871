"""The thin matrix products of a LoRA layer, each a single pass over its large operand.

    down          xa  = s * x A^T                           x (T, K), A (R, K) -> (T, R)
    up_gradients  dxa = s * dy B,  dB = dy^T xa             dy (T, N), B (N, R) -> (T, R), (N, R)
    down_gradient dA  = dxa^T x                             dxa (T, R), x (T, K) -> (R, K)

They are memory-bound: the arithmetic on a row of R <= 256 hides behind the load of x or dy.  `rows_kernel` reduces
along rows: xa, dxa.  `columns_kernel` reduces along columns: dA, dB; it can also multiply each tile of dy by B, so one
pass yields dxa and dB.  Sums that are split over several programs are stored as float32 partial sums, one per split,
which `reduce_kernel` adds in a fixed order: without atomics, results are deterministic.

The scaling is applied to xa and to dxa: then y = xa B^T + x W^T, dx = dxa A + dy W, dB and dA need no other factor, and
there is one rounding where eager has two, of xa and of s times the product.

Each function accepts any operands and falls back to cuBLAS where the kernels do not support them or measured slower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import HALF_DTYPES, processors
from fastlora.kernels.triton.blocks.matmul import fits_descriptor, is_tuned, make_descriptor
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import allocate, cdiv, power_of_two

REDUCE_BLOCK = 256
"""Output elements of one program of `reduce_kernel`."""
SHARED_MEMORY = 220_000
LARGE = 2**24
"""Elements of x or dy above which these kernels beat cuBLAS; below, launch overhead dominates."""
MAX_FUSED_RANK = 32
"""The largest rank block for which computing dxa and dB in one pass beats two: partial sums grow with the rank."""


class TileConfig(NamedTuple):
    """The tile of the large operand that a program loads at a time, and the kernel's launch options."""

    rows: int
    cols: int
    warps: int
    stages: int


# Measured on an H200.
ROWS = TileConfig(64, 128, warps=4, stages=6)
COLUMNS = TileConfig(64, 128, warps=4, stages=6)
FUSED = TileConfig(64, 256, warps=4, stages=4)
FUSED_WIDE = TileConfig(64, 512, warps=4, stages=3)
"""For many columns and rank <= 16, which leaves registers for 512 columns: half as many partial sums of dxa."""


@precompile.kernel(do_not_specialize=["T", "scaling", "split_size", "split_stride"])
def rows_kernel(
    x, factor, out_ptr, scaling, T, K, R, factor_stride, split_size, split_stride, out_stride,
    FACTOR_T: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out (T, R) = scaling * x (T, K) @ factor (K, R), summed over split_size of the K elements.

    Grid: (blocks of rows, splits). FACTOR_T: the factor is stored as (R, K) and passed as a tensor descriptor;
    otherwise as a pointer, since TMA is slow for rows this short.
    """
    t = tl.program_id(0) * BLOCK_T
    begin = tl.program_id(1) * split_size
    end = min(begin + split_size, K)
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
    out_ptr += tl.program_id(1).to(tl.int64) * split_stride + row * out_stride + r
    tl.store(out_ptr, (acc * scaling).to(out_ptr.dtype.element_ty), mask=(row < T) & (r < R))


@precompile.kernel(do_not_specialize=["T", "scaling", "split_size", "split_stride"])
def columns_kernel(
    x, thin_ptr, columns_ptr, factor_ptr, rows_ptr, scaling, T, C, R,
    thin_stride, column_stride, r_stride, split_stride, factor_stride, factor_r_stride, split_size,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """columns (C, R) = x (T, C)^T @ thin (T, R), summed over split_size of the T rows; if a factor is given, also
    rows (T, R) = scaling * x @ factor (C, R), summed over the program's BLOCK_C columns.

    Grid: (blocks of columns, splits). There is a partial sum of columns for each program_id(1), of rows for each
    program_id(0).
    """
    c = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[:, None].to(tl.int64)
    r = tl.arange(0, BLOCK_R)[None, :]
    begin = tl.program_id(1) * split_size
    end = min(begin + split_size, T)
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
    columns_ptr += tl.program_id(1).to(tl.int64) * split_stride
    tl.store(
        columns_ptr + c * column_stride + r * r_stride, acc.to(columns_ptr.dtype.element_ty), mask=(c < C) & (r < R)
    )


@triton.jit
def _add_partials(partials_ptr, out_ptr, block, count, size, width, stride, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    i = block * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, count, BLOCK_P, num_stages=1):  # latency-bound: issue all loads of a step at once
        part = first + tl.arange(0, BLOCK_P)[:, None]
        mask = (part < count) & (i < size)[None, :]
        acc += tl.sum(tl.load(partials_ptr + part.to(tl.int64) * size + i[None, :], mask=mask, other=0.0), axis=0)
    tl.store(out_ptr + (i // width).to(tl.int64) * stride + i % width, acc.to(out_ptr.dtype.element_ty), mask=i < size)


@precompile.kernel(do_not_specialize=["count0", "count1"])
def reduce_kernel(
    partials0_ptr, out0_ptr, count0, size0, width0, stride0, partials1_ptr, out1_ptr, count1, size1, width1, stride1,
    BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """out = the sum of `count` partial sums of `size` elements each, rounded once; optionally a second such sum.

    Rows of out have `width` elements and stride `stride`.
    """
    first = tl.cdiv(size0, BLOCK)
    block = tl.program_id(0)
    if block < first:
        _add_partials(partials0_ptr, out0_ptr, block, count0, size0, width0, stride0, BLOCK, BLOCK_P)
    elif partials1_ptr is not None:
        _add_partials(partials1_ptr, out1_ptr, block - first, count1, size1, width1, stride1, BLOCK, BLOCK_P)


def reduce(*sums: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Write `partials.sum(0)` to `out` for one or two pairs (partials, out), in one launch."""
    args: list[object] = []
    blocks = 0
    for partials, out in sums:
        args += [partials, out, partials.shape[0], out.numel(), out.shape[1], out.stride(0)]
        blocks += cdiv(out.numel(), REDUCE_BLOCK)
    if len(sums) == 1:
        args += [None, None, 0, 0, 1, 1]
    reduce_kernel[(blocks,)](*args, BLOCK=REDUCE_BLOCK, BLOCK_P=16, num_warps=4)


def split_sum(blocks: int, size: int, step: int, programs: int, min_steps: int = 4) -> tuple[int, int]:
    """Return how many splits to make of a sum over `size` elements, and the size of each.

    There are as many as keep blocks * splits within `programs`, each of at least `min_steps` steps of `step` elements.
    """
    splits = max(1, min(size // (min_steps * step), programs // blocks))
    split_size = cdiv(cdiv(size, splits), step) * step
    return cdiv(size, split_size), split_size


def block_size(R: int) -> int:
    """Return the smallest block that `tl.dot` supports for a dimension of size R."""
    return max(16, power_of_two(R))


def _stages(config: TileConfig, thin_bytes: int, held_bytes: int = 0) -> int:
    """Return how many pipeline stages, each a tile and `thin_bytes`, fit into shared memory beside `held_bytes`."""
    return max(2, min(config.stages, (SHARED_MEMORY - held_bytes) // (config.rows * config.cols * 2 + thin_bytes)))


def sum_rows(
    x: torch.Tensor, factor: torch.Tensor, scaling: float, out: torch.Tensor, config: TileConfig = ROWS
) -> torch.Tensor:
    """Write scaling * x (T, K) @ factor (K, R) to `out` (T, R) and return it."""
    (T, K), R = x.shape, factor.shape[1]
    block, transposed = block_size(R), factor.stride(1) != 1
    blocks = cdiv(T, config.rows)
    splits, split_size = split_sum(blocks, K, config.cols, processors(x.device))
    target = out if splits == 1 else allocate((splits, T, R), torch.float32, x.device)
    rows_kernel[(blocks, splits)](
        make_descriptor(x, config.rows, config.cols),
        make_descriptor(factor.t(), block, config.cols) if transposed else factor, target,
        scaling, T, K, R, factor.stride(0), split_size, target.stride(0), target.stride(-2), transposed,
        config.rows, config.cols, block,
        num_warps=config.warps, num_stages=_stages(config, 2 * config.cols * block),
    )  # fmt: skip
    if splits > 1:
        reduce((target, out))
    return out


def sum_columns(
    x: torch.Tensor, thin: torch.Tensor, out: torch.Tensor, config: TileConfig = COLUMNS,
    factor: torch.Tensor | None = None, scaling: float = 1.0, rows: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Write x (T, C)^T @ thin (T, R) to `out` (C, R), which is contiguous or the transpose of a contiguous matrix.

    If `factor` (C, R) and `rows` (T, R) are given, also write scaling * x @ factor to `rows`.
    """
    (T, C), R = x.shape, thin.shape[1]
    block = block_size(R)
    held_bytes = 0 if factor is None else 2 * config.cols * block
    blocks = cdiv(C, config.cols)
    splits, split_size = split_sum(blocks, T, config.rows, processors(x.device))
    partials = out.unsqueeze(0)
    if splits > 1:
        partials = allocate((splits, C * R), torch.float32, x.device)
        partials = partials.view(splits, C, R) if out.stride(1) == 1 else partials.view(splits, R, C).transpose(1, 2)
    row_partials = None if factor is None else allocate((blocks, T, R), torch.float32, x.device)
    columns_kernel[(blocks, splits)](
        make_descriptor(x, config.rows, config.cols), thin, partials, factor, row_partials, scaling, T, C, R,
        thin.stride(0), partials.stride(1), partials.stride(2), C * R,
        *((0, 0) if factor is None else factor.stride()),
        split_size, BLOCK_T=config.rows, BLOCK_C=config.cols, BLOCK_R=block,
        num_warps=config.warps, num_stages=_stages(config, 2 * config.rows * block, held_bytes),
    )  # fmt: skip
    sums = [] if row_partials is None or rows is None else [(row_partials, rows)]
    if splits > 1:
        sums.append((partials, out) if out.stride(1) == 1 else (partials, out.t()))
    if sums:
        reduce(*sums)


def down(
    x: torch.Tensor, factors: Sequence[torch.Tensor], scaling: float = 1.0, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return scaling * x (T, K) @ A^T for each A (R, K), concatenated along columns to (T, sum of R), in x's dtype.

    Passing a single A that is already stacked and in x's dtype saves a launch or two.
    """
    if out is None:
        out = allocate((x.shape[0], sum(a.shape[0] for a in factors)), x.dtype, x.device)
    a = (factors[0] if len(factors) == 1 else torch.cat(list(factors))).to(x.dtype)
    if _by_rows(x, a.shape[0]) and a.stride(1) == 1 and fits_descriptor(a):
        return sum_rows(x, a.t(), scaling, out)
    return _product_into(out, x, a.t(), scaling)


def up_gradients(
    dy: torch.Tensor,
    lora_b: torch.Tensor,
    xa: torch.Tensor,
    scaling: float,
    dtype: torch.dtype,
    needs: tuple[bool, bool] = (True, True),
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return dxa (T, R) = scaling * dy (T, N) @ B (N, R), in dy's dtype, and dB (N, R) = dy^T @ xa (T, R), in `dtype`.

    Args:
        dy, lora_b: the operands.
        xa: the result of `down`, which includes the scaling.
        scaling: the factor of dxa.
        dtype: of dB.
        needs: whether dxa and dB are computed; None is returned for those that are not.
        out: where to write dxa, such as a slice of columns of a wider matrix.
    """
    (T, R), block = xa.shape, block_size(xa.shape[1])
    dxa = None
    if needs[0]:
        dxa = allocate((T, R), dy.dtype, dy.device) if out is None else out
    supported = _supports(dy) and xa.dtype == dy.dtype and xa.stride(1) == 1
    if dxa is not None and needs[1] and supported and block <= MAX_FUSED_RANK and dy.numel() >= LARGE // 8:
        db = allocate((dy.shape[1], R), dtype, dy.device)
        wide = block == 16 and dy.shape[1] >= 8192
        sum_columns(dy, xa, db, FUSED_WIDE if wide else FUSED, lora_b, scaling, dxa)
        return dxa, db
    if dxa is not None:
        b = lora_b.to(dy.dtype)
        if _by_rows(dy, R) and b.stride(1) == 1:
            sum_rows(dy, b, scaling, dxa)
        else:
            _product_into(dxa, dy, b, scaling)
    return dxa, _transposed_product(dy, xa, dtype) if needs[1] else None


def down_gradient(dxa: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return dA (R, K) = dxa (T, R)^T @ x (T, K) in `dtype`; for a group, dxa has all members' columns."""
    if not _by_columns(x, dxa):
        return _cublas_product(dxa.t(), x, dtype)
    out = allocate((dxa.shape[1], x.shape[1]), dtype, x.device)
    sum_columns(x, dxa, out.t())
    return out


def _transposed_product(dy: torch.Tensor, xa: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return dy (T, N)^T @ xa (T, R) in `dtype`."""
    if not _by_columns(dy, xa):
        return _cublas_product(dy.t(), xa, dtype)
    out = allocate((dy.shape[1], xa.shape[1]), dtype, dy.device)
    sum_columns(dy, xa, out)
    return out


def _cublas_product(left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.float32 and left.dtype == right.dtype and left.dtype in HALF_DTYPES:
        return mm_float32(left, right)
    return (left @ right).to(dtype)


def mm_float32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return left @ right in float32, for 16-bit operands, without casting them where cuBLAS is available."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.is_cuda else left.float() @ right.float()


def _product_into(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """Write scaling * left @ right to `out`, rounded once, and return it."""
    return torch.addmm(out, left, right, beta=0, alpha=scaling, out=out)


def _supports(x: torch.Tensor) -> bool:
    """Return whether the kernels support x as their large operand, on a GPU that they are tuned for."""
    return x.dtype in HALF_DTYPES and x.stride(1) == 1 and fits_descriptor(x) and is_tuned(x.device)


def _by_rows(x: torch.Tensor, R: int) -> bool:
    """Return whether `sum_rows` supports x and measured faster than cuBLAS: where its waves are full."""
    if R > 64 or x.numel() < LARGE or not _supports(x):
        return False
    programs, blocks = processors(x.device), cdiv(x.shape[0], ROWS.rows)
    blocks *= max(1, programs // blocks)
    return blocks >= 0.9 * programs * cdiv(blocks, programs)


def _by_columns(x: torch.Tensor, thin: torch.Tensor) -> bool:
    """Return whether `sum_columns` supports x^T @ thin and measured faster than cuBLAS."""
    fits = thin.shape[1] <= 32 and x.numel() >= LARGE and thin.dtype == x.dtype and thin.stride(1) == 1
    return fits and _supports(x)
