"""Decoding of 4-bit weights: `kernels/formulas/dequantize.py` has the formula.

A thread reads a word of eight halves, looks each up in the 16 values of the code, which stay in the first-level cache,
and writes eight neighbours together. Multiplication and addition of the nested scales must not be contracted into one
rounding, or the scales would not be bitsandbytes'.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import computes
from fastlora.kernels.formulas import dequantize as op
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import cdiv, empty

UNITS, WARPS = 128, 2
"""Stored units that a program decodes, and its warps. Measured on an H200, bfloat16."""


@triton.jit
def scales(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, present, NESTED_BLOCKSIZE: tl.constexpr):
    """The scales of blocks, in float32; zeros where none is present."""
    stored = tl.load(absmax_ptr + block, mask=present, other=0)
    if nested_absmax_ptr is not None:
        nested = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=present, other=0.0)
        scale = tl.load(nested_code_ptr + stored.to(tl.int32)).to(tl.float32) * nested.to(tl.float32)
        if offset_ptr is not None:
            scale = scale + tl.load(offset_ptr).to(tl.float32)
    else:
        scale = stored.to(tl.float32)
    return scale


@triton.jit
def halves(stored, code_ptr, PER: tl.constexpr):
    """The code's values of the PER halves of each stored unit, as a last dimension."""
    half = tl.arange(0, PER).reshape([1] * len(stored.shape) + [PER])
    shift = half // 2 * 8 + (1 - half % 2) * 4  # bytes from low to high, in each the high half first
    return tl.load(code_ptr + ((tl.expand_dims(stored, -1) >> shift) & 15))


@precompile.kernel()
def kernel(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr, out_ptr,
    K, units, out_stride,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    ONE_ROW: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row, i] = code[q_i] * scale of i's block, for BLOCK stored units of PER halves each of one row.

    A unit lies within a block, and, but for the last, within a row, which is of K halves and `units` units.
    """
    if ONE_ROW:
        row = 0
        start = tl.program_id(0).to(tl.int64) * BLOCK
    else:
        across = tl.cdiv(units, BLOCK)
        row = (tl.program_id(0) // across).to(tl.int64)
        start = (tl.program_id(0) % across).to(tl.int64) * BLOCK
    unit = tl.arange(0, BLOCK)
    present = unit < units - start
    at = row * units + start + unit
    words = packed_ptr.to(tl.pointer_type(tl.int32 if PER == 8 else tl.uint8), bitcast=True)
    stored = tl.load(words + at, mask=present, other=0).to(tl.int32)
    block = at // (BLOCKSIZE // PER)
    scale = scales(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, present, NESTED_BLOCKSIZE)
    value = halves(stored, code_ptr, PER) * scale[:, None]
    i = unit[:, None] * PER + tl.arange(0, PER)[None, :]
    to = out_ptr + row * out_stride + start * PER
    tl.store(to + i, value.to(out_ptr.dtype.element_ty), mask=i < K - start * PER)


def decode_into(
    out: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
) -> None:
    """Writes the matrix into `out` (rows, cols), whose rows may lie apart, as in a wider buffer."""
    rows, cols = out.shape
    if out.stride(0) == cols:  # rows that follow each other are one
        rows, cols = 1, rows * cols
    stored = packed.contiguous()
    whole = blocksize % 8 == 0 and (rows == 1 or cols % 8 == 0)
    per = 8 if whole and stored.nbytes % 4 == 0 and stored.data_ptr() % 4 == 0 else 2
    if rows > 1 and cols % per:  # a byte has the end of a row and the beginning of the next
        whole_rows = empty(rows, cols, like=out)
        decode_into(
            whole_rows, packed, absmax, nested_absmax, nested_code, offset, blocksize, nested_blocksize, quant_type
        )
        out.copy_(whole_rows)
        return
    units = cdiv(cols, per)
    kernel[(rows * cdiv(units, UNITS),)](
        stored, absmax, nested_absmax, nested_code, offset, op.code(quant_type, packed.device), out,
        cols, units, out.stride(0),
        BLOCKSIZE=blocksize, NESTED_BLOCKSIZE=nested_blocksize, ONE_ROW=rows == 1, PER=per, BLOCK=UNITS,
        num_warps=WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def serves(packed: torch.Tensor, absmax: torch.Tensor, rows: int, cols: int, dtype: torch.dtype, **_: Any) -> bool:
    return absmax.is_contiguous() and rows * cols > 0 and computes(dtype, packed.device)


def forward(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype, **format_: Any) -> tuple[torch.Tensor]:
    out = empty(rows, cols, like=packed, dtype=dtype)
    decode_into(out, packed, **format_)
    return (out,)


op.dequantize_4bit.implementation("triton", forward=forward, serves=serves, traceable=True)
