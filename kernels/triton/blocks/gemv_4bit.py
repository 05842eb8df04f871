"""The product of a few rows with a 4-bit weight, which is dequantized in registers where it is multiplied by.

    y (T, N) = x (T, K) W^T (+ xa (T, R) B^T) (+ b)        W (N, K) as `kernels/formulas/dequantize.py` has it

So few rows take as long as reading the weight does.  Quantized it is half a byte an element, where a dequantized matrix
would be written and read again, two bytes each.  The factors are the values of the dequantized matrix, bit for bit.

One row, as when a model generates, needs no tensor cores: a thread multiplies the eight halves of a word as it decodes
them.  For more rows programs decode a tile of W into shared memory and multiply there; where blocks of columns do not
fill the GPU, the sums are cut into shares, kept in float32 and added in order: no atomics, so two runs give equal bits.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import HALVES, processors
from fastlora.kernels.core.quantized_weight import QuantizedWeight
from fastlora.kernels.formulas import dequantize as op
from fastlora.kernels.triton.blocks.low_rank import Sweep, block_of, in_shares, reduce
from fastlora.kernels.triton.blocks.matmul import measured
from fastlora.kernels.triton.dequantize import halves, scales
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import allocate, cdiv

MOST_ROWS = 64
LARGE = 1 << 25
"""Elements of a weight from which on more than one row are faster so than with a dequantized weight."""
WIDEST_RANK = 64

PER = 8
"""Halves of a word."""


ONE = Sweep(8, 1024, warps=4, stages=2)
FEW = Sweep(64, 128, warps=4, stages=1)
PROGRAMS = 8
"""For each processor, where the sums are cut. All measured on an H100, bfloat16: with more stages, loads of the code's
values would be pipelined, through memory, and take several times as long."""


@triton.jit
def _decoded(
    words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr, row, word, N, across,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The values of W at some rows and words of these, which are `across` in a row; the halves as a last dimension."""
    present = (row < N) & (word < across)
    at = row * across + word
    stored = tl.load(words_ptr + at, mask=present, other=0)
    block = at // (BLOCKSIZE // 8)
    scale = scales(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, present, NESTED_BLOCKSIZE)
    return (halves(stored, code_ptr, 8) * scale[:, :, None]).to(DTYPE)


@precompile.kernel()
def one_row_kernel(
    x_ptr, words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr,
    xa_ptr, b_ptr, bias_ptr, out_ptr, N, K, R, b_stride, b_r_stride,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, WORDS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out (N,), BLOCK_N of it."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = cols.to(tl.int64)[:, None]
    acc = tl.zeros((BLOCK_N, WORDS), tl.float32)
    for first in tl.range(0, K // 8, WORDS):
        word = first + tl.arange(0, WORDS)
        weight = _decoded(
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


@precompile.kernel(do_not_specialize=["T", "SHARE", "share_stride"])
def few_rows_kernel(
    x_ptr, words_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr,
    xa_ptr, b_ptr, bias_ptr, out_ptr,
    T, N, K, R, x_stride, xa_stride, b_stride, b_r_stride, SHARE, share_stride, out_stride,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out (T, N), or a share of it: BLOCK_N columns, over SHARE of the K summed elements.

    Programs: (blocks of columns, shares). The first share has the low-rank product and the bias.
    """
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = cols.to(tl.int64)[:, None]
    t = tl.arange(0, BLOCK_T).to(tl.int64)[:, None]
    begin = tl.program_id(1) * SHARE
    end = min(begin + SHARE, K)
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for k in tl.range(begin, end, WORDS * 8):
        word = k // 8 + tl.arange(0, WORDS)[None, :]
        weight = _decoded(
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
    at = tl.program_id(1).to(tl.int64) * share_stride + t * out_stride + cols[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=(t < T) & (cols[None, :] < N))


Low = tuple[torch.Tensor, torch.Tensor]
"""xa (T, R), and B^T (R, N)."""


def serves(weight: Any, x: torch.Tensor, low: Low | None, bias: torch.Tensor | None) -> TypeGuard[QuantizedWeight]:
    """Return whether W (N, K) is quantized, and the kernels take it and x (T, K) and beat a dequantized weight."""
    T, K = x.shape
    if T > MOST_ROWS or type(weight) is not QuantizedWeight or weight.source is not op.dequantize_4bit:
        return False
    given = weight.arguments
    return (
        T > 0
        and (T == 1 or weight.numel() >= LARGE)
        and weight.numel() > 0
        and weight.dtype is x.dtype
        and x.dtype in HALVES
        and x.stride(1) == 1
        and (low is None or (low[0].shape[1] <= WIDEST_RANK and low[0].stride(1) == 1))
        and (bias is None or bias.stride(0) == 1)
        and K % PER == given["blocksize"] % PER == 0
        and given["absmax"].is_contiguous()
        and given["packed"].is_contiguous()
        and given["packed"].data_ptr() % 4 == 0
        and measured(x.device)
    )


def product(
    x: torch.Tensor, weight: QuantizedWeight, low: Low | None, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """y (T, N) in `dtype` = x (T, K) W^T + xa B^T + bias (N,), rounded once."""
    (T, K), N, given = x.shape, weight.shape[0], weight.arguments
    xa, b = (None, None) if low is None else low
    R = 0 if xa is None else xa.shape[1]
    to_b = (0, 0) if b is None else (b.stride(1), b.stride(0))
    out = allocate((T, N), dtype, x.device)
    packed = given["packed"].view(-1).view(torch.int32)
    parts = (packed, *(given[name] for name in ("absmax", "nested_absmax", "nested_code", "offset")))
    operands = (x, *parts, op.code(given["quant_type"], x.device), xa, b, bias)
    sweep = ONE if T == 1 else FEW
    strips = cdiv(N, sweep.rows)
    options = {
        "BLOCKSIZE": given["blocksize"], "NESTED_BLOCKSIZE": given["nested_blocksize"], "BLOCK_N": sweep.rows,
        "WORDS": sweep.cols // PER, "BLOCK_R": block_of(R),
        "num_warps": sweep.warps, "num_stages": sweep.stages, "enable_fp_fusion": False,
    }  # fmt: skip
    if T == 1:
        one_row_kernel[(strips,)](*operands, out, N, K, R, *to_b, **options)
        return out
    count, share = in_shares(strips, K, sweep.cols, PROGRAMS * processors(x.device), steps=2)
    shares = out.unsqueeze(0) if count == 1 else allocate((count, T, N), torch.float32, x.device)
    few_rows_kernel[(strips, count)](
        *operands, shares, T, N, K, R, x.stride(0), 0 if xa is None else xa.stride(0), *to_b,
        share, shares.stride(0), shares.stride(1), BLOCK_T=block_of(T), **options,
    )  # fmt: skip
    if count > 1:
        reduce((shares, out))
    return out
