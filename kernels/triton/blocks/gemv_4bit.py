"""Product of a few rows with a 4-bit weight that is dequantized in registers.

    y (T, N) = x (T, K) W^T (+ xa (T, R) B^T) (+ b)        W (N, K) as in `kernels/formulas/dequantize.py`

With so few rows the product is bound by reading the weight: half a byte per element here, where a dequantized matrix
would be written and read again at two bytes each.  The values of W equal those of the dequantized matrix bit for bit.

A single row, as in generation, needs no tensor cores: each thread multiplies the eight 4-bit values of a word as it
decodes them.  For more rows, programs decode a tile of W into shared memory and use tensor cores there; if blocks of
columns do not fill the GPU, the sum is split along K into float32 partial sums, which are added in a fixed order:
without atomics, results are deterministic.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import HALF_DTYPES, processors
from fastlora.kernels.core.quantized_weight import QuantizedWeight
from fastlora.kernels.formulas import dequantize as op
from fastlora.kernels.triton.blocks.low_rank import TileConfig, block_size, reduce, split_sum
from fastlora.kernels.triton.blocks.matmul_tiles import is_tuned
from fastlora.kernels.triton.dequantize import load_scales, unpack
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import allocate, cdiv

MAX_ROWS = 64
LARGE = 1 << 25
"""Elements of a weight above which these kernels beat a dequantized weight for more than one row."""
MAX_RANK = 64

VALUES_PER_WORD = 8
"""4-bit values in a 32-bit word."""


# Measured on an H100, bfloat16. With more stages, loads of the code table would be pipelined through shared memory, and
# take several times as long.
ONE = TileConfig(8, 1024, warps=4, stages=2)
FEW = TileConfig(64, 128, warps=4, stages=1)
PROGRAMS = 8
"""Programs per streaming multiprocessor when the sum is split."""


@triton.jit
def _decode(
    words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr, row, word, N, words_per_row,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the values of W at the given rows and words, of which a row has `words_per_row`; the 4-bit values of a
    word are the last dimension."""
    mask = (row < N) & (word < words_per_row)
    at = row * words_per_row + word
    packed = tl.load(words_ptr + at, mask=mask, other=0)
    block = at // (BLOCKSIZE // 8)
    scale = load_scales(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, mask, NESTED_BLOCKSIZE)
    return (unpack(packed, code_ptr, 8) * scale[:, :, None]).to(DTYPE)


@precompile.kernel()
def one_row_kernel(
    x_ptr, words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr,
    xa_ptr, b_ptr, bias_ptr, out_ptr, N, K, R, b_stride, b_r_stride,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, WORDS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_N elements of out (N,) for T = 1."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = cols.to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_N, WORDS), tl.float32)
    for first in tl.range(0, K // 8, WORDS):
        word = first + tl.arange(0, WORDS)
        weight = _decode(
            words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr, row, word[None, :],
            N, K // 8, BLOCKSIZE, NESTED_BLOCKSIZE, x_ptr.dtype.element_ty,
        )  # fmt: skip
        i = word[:, None] * 8 + tl.arange(0, 8)[None, :]
        x = tl.load(x_ptr + i, mask=i < K, other=0.0)
        acc += tl.sum(x.to(tl.float32)[None, :, :] * weight.to(tl.float32), axis=2)
    y = tl.sum(acc, axis=1)
    if b_ptr is not None:
        r = tl.arange(0, BLOCK_R)[None, :]
        b = tl.load(b_ptr + row * b_stride + r * b_r_stride, mask=(row < N) & (r < R), other=0.0)
        xa = tl.load(xa_ptr + r, mask=r < R, other=0.0)
        y += tl.sum(b.to(tl.float32) * xa.to(tl.float32), axis=1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + cols, y.to(out_ptr.dtype.element_ty), mask=cols < N)


@precompile.kernel(do_not_specialize=["T", "split_size", "split_stride"])
def few_rows_kernel(
    x_ptr, words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr,
    xa_ptr, b_ptr, bias_ptr, out_ptr,
    T, N, K, R, x_stride, xa_stride, b_stride, b_r_stride, split_size, split_stride, out_stride,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_N columns of out (T, N), or of its partial sum over split_size of the K elements.

    Grid: (blocks of columns, splits). The first split adds the low-rank product and the bias.
    """
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = cols.to(tl.int64)[:, None]
    t = tl.arange(0, BLOCK_T).to(tl.int64)[:, None]
    begin = tl.program_id(1) * split_size
    end = min(begin + split_size, K)
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for k in tl.range(begin, end, WORDS * 8):
        word = k // 8 + tl.arange(0, WORDS)[None, :]
        weight = _decode(
            words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr, row, word,
            N, K // 8, BLOCKSIZE, NESTED_BLOCKSIZE, x_ptr.dtype.element_ty,
        ).reshape(BLOCK_N, WORDS * 8)  # fmt: skip
        i = k + tl.arange(0, WORDS * 8)[None, :]
        x = tl.load(x_ptr + t * x_stride + i, mask=(t < T) & (i < K), other=0.0)
        acc = tl.dot(x, weight.T, acc)
    if tl.program_id(1) == 0:
        if b_ptr is not None:
            r = tl.arange(0, BLOCK_R)[None, :]
            xa = tl.load(xa_ptr + t * xa_stride + r, mask=(t < T) & (r < R), other=0.0)
            b = tl.load(b_ptr + row * b_stride + r * b_r_stride, mask=(row < N) & (r < R), other=0.0)
            acc = tl.dot(xa, b.T, acc)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    at = tl.program_id(1).to(tl.int64) * split_stride + t * out_stride + cols[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(t < T) & (cols[None, :] < N))


LowRank = tuple[torch.Tensor, torch.Tensor]
"""xa (T, R), and B^T (R, N)."""


def serves(weight: Any, x: torch.Tensor, low: LowRank | None, bias: torch.Tensor | None) -> TypeGuard[QuantizedWeight]:
    """Return whether W (N, K) is quantized, and the kernels support it and x (T, K) and beat a dequantized weight."""
    T, K = x.shape
    if T > MAX_ROWS or type(weight) is not QuantizedWeight or weight.source is not op.dequantize_4bit:
        return False
    given = weight.arguments
    return (
        T > 0
        and (T == 1 or weight.numel() >= LARGE)
        and weight.numel() > 0
        and weight.dtype is x.dtype
        and x.dtype in HALF_DTYPES
        and x.stride(1) == 1
        and (low is None or (low[0].shape[1] <= MAX_RANK and low[0].stride(1) == 1))
        and (bias is None or bias.stride(0) == 1)
        and K % VALUES_PER_WORD == given["blocksize"] % VALUES_PER_WORD == 0
        and given["absmax"].is_contiguous()
        and given["packed"].is_contiguous()
        and given["packed"].data_ptr() % 4 == 0
        and is_tuned(x.device)
    )


def product(
    x: torch.Tensor, weight: QuantizedWeight, low: LowRank | None, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return y (T, N) = x (T, K) W^T + xa B^T + bias (N,), rounded once to `dtype`."""
    (T, K), N, given = x.shape, weight.shape[0], weight.arguments
    xa, b = (None, None) if low is None else low
    R = 0 if xa is None else xa.shape[1]
    b_strides = (0, 0) if b is None else (b.stride(1), b.stride(0))
    out = allocate((T, N), dtype, x.device)
    packed = given["packed"].view(-1).view(torch.int32)
    parts = (packed, *(given[name] for name in ("absmax", "nested_absmax", "nested_code", "offset")))
    operands = (x, *parts, op.code(given["quant_type"], x.device), xa, b, bias)
    config = ONE if T == 1 else FEW
    blocks = cdiv(N, config.rows)
    options = {
        "BLOCKSIZE": given["blocksize"], "NESTED_BLOCKSIZE": given["nested_blocksize"], "BLOCK_N": config.rows,
        "WORDS": config.cols // VALUES_PER_WORD, "BLOCK_R": block_size(R),
        "num_warps": config.warps, "num_stages": config.stages, "enable_fp_fusion": False,
    }  # fmt: skip
    if T == 1:
        one_row_kernel[(blocks,)](*operands, out, N, K, R, *b_strides, **options)
        return out
    splits, split_size = split_sum(blocks, K, config.cols, PROGRAMS * processors(x.device), min_steps=2)
    partials = out.unsqueeze(0) if splits == 1 else allocate((splits, T, N), torch.float32, x.device)
    few_rows_kernel[(blocks, splits)](
        *operands, partials, T, N, K, R, x.stride(0), 0 if xa is None else xa.stride(0), *b_strides,
        split_size, partials.stride(0), partials.stride(1), BLOCK_T=block_size(T), **options,
    )  # fmt: skip
    if splits > 1:
        reduce((partials, out))
    return out
