"""Decoding of 4-bit weights: `kernels/formulas/dequantize.py` has the formula.

A thread reads a word of eight 4-bit values, looks each up in the 16-entry code table, which stays in the L1 cache, and
writes eight adjacent elements at once. FMA contraction is off (`enable_fp_fusion=False`): with it, nested scales would
differ from bitsandbytes' in the last bit.
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
"""Words or bytes that a program decodes, and its warps. Measured on an H200, bfloat16."""


@triton.jit
def load_scales(
    absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, mask, NESTED_BLOCKSIZE: tl.constexpr
):
    """Return the scales of blocks in float32, zeros where masked."""
    stored = tl.load(absmax_ptr + block, mask=mask, other=0)
    if nested_absmax_ptr is not None:
        nested = tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        scale = tl.load(nested_code_ptr + stored.to(tl.int32)).to(tl.float32) * nested.to(tl.float32)
        if offset_ptr is not None:
            scale = scale + tl.load(offset_ptr).to(tl.float32)
    else:
        scale = stored.to(tl.float32)
    return scale


@triton.jit
def unpack(packed, code_ptr, PER: tl.constexpr):
    """Return code[q] for the PER 4-bit values q of each packed word or byte, as a new last dimension."""
    nibble = tl.arange(0, PER).reshape([1] * len(packed.shape) + [PER])
    shift = nibble // 2 * 8 + (1 - nibble % 2) * 4  # bytes from low to high, in each the high nibble first
    return tl.load(code_ptr + ((tl.expand_dims(packed, -1) >> shift) & 15))


@precompile.kernel()
def kernel(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr, out_ptr,
    K, units, out_stride,
    BLOCKSIZE: tl.constexpr, NESTED_BLOCKSIZE: tl.constexpr,
    ONE_ROW: tl.constexpr, PER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[row, i] = code[q_i] * absmax[i // BLOCKSIZE], for BLOCK units of one row.

    A unit is a packed word or byte with PER 4-bit values. A row has K values in `units` units. No unit crosses a block,
    and only a row's last unit may extend beyond the row.
    """
    if ONE_ROW:
        row = 0
        start = tl.program_id(0).to(tl.int64) * BLOCK
    else:
        blocks = tl.cdiv(units, BLOCK)
        row = (tl.program_id(0) // blocks).to(tl.int64)
        start = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    unit = tl.arange(0, BLOCK)
    mask = unit < units - start
    at = row * units + start + unit
    units_ptr = packed_ptr.to(tl.pointer_type(tl.int32 if PER == 8 else tl.uint8), bitcast=True)
    packed = tl.load(units_ptr + at, mask=mask, other=0).to(tl.int32)
    block = at // (BLOCKSIZE // PER)
    scale = load_scales(absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, block, mask, NESTED_BLOCKSIZE)
    value = unpack(packed, code_ptr, PER) * scale[:, None]
    i = unit[:, None] * PER + tl.arange(0, PER)[None, :]
    out_ptr += row * out_stride + start * PER
    tl.store(out_ptr + i, value.to(out_ptr.dtype.element_ty), mask=i < K - start * PER)


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
    """Write the decoded matrix to `out` (rows, cols), whose rows may be part of a wider buffer."""
    rows, cols = out.shape
    if out.stride(0) == cols:  # contiguous rows are treated as one
        rows, cols = 1, rows * cols
    stored = packed.contiguous()
    whole = blocksize % 8 == 0 and (rows == 1 or cols % 8 == 0)
    per = 8 if whole and stored.nbytes % 4 == 0 and stored.data_ptr() % 4 == 0 else 2
    if rows > 1 and cols % per:  # a byte contains the end of one row and the start of the next
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
