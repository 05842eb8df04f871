"""Decoding of 4-bit weights: `kernels/dequantize.py` has the formula.

A thread reads a word of eight halves, looks each up in the 16 values of the code, which stay in the first-level cache,
and writes eight neighbours together. Multiplication and addition of the nested scales must not be contracted into one
rounding, or the scales would not be bitsandbytes'.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels import dequantize as op
from fastlora.kernels.forms import Form
from fastlora.kernels.gpu.launch import FLOATS, capability, empty

_ELEMENTS = 4096
"""What a program decodes."""


@triton.jit(do_not_specialize=["nested_blocksize"])
def kernel(
    packed_ptr, absmax_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, code_ptr, out_ptr,
    elements, K, out_stride, nested_blocksize,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, OFFSET: tl.constexpr, APART: tl.constexpr,
    PER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[i // K, i % K] = code[q_i] * scale of i's block, for BLOCK stored units of PER halves each.

    A unit lies within a block. APART: rows of `out` do not follow each other in memory.
    """
    unit = tl.arange(0, BLOCK).to(tl.int64) + tl.program_id(0).to(tl.int64) * BLOCK
    present = unit * PER < elements
    stored = tl.load(packed_ptr + unit, mask=present, other=0).to(tl.int32)
    block = unit * PER // BLOCKSIZE
    if NESTED:
        index = tl.load(absmax_ptr + block, mask=present, other=0).to(tl.int32)
        nested = tl.load(nested_absmax_ptr + block // nested_blocksize, mask=present, other=0.0)
        scale = tl.load(nested_code_ptr + index).to(tl.float32) * nested.to(tl.float32)
        if OFFSET:
            scale = scale + tl.load(offset_ptr).to(tl.float32)
    else:
        scale = tl.load(absmax_ptr + block, mask=present, other=0.0).to(tl.float32)
    half = tl.arange(0, PER)[None, :]
    shift = half // 2 * 8 + (1 - half % 2) * 4  # bytes from low to high, in each the high half first
    value = tl.load(code_ptr + ((stored[:, None] >> shift) & 15)) * scale[:, None]
    i = unit[:, None] * PER + half
    at = i
    if APART:
        at = (i // K) * out_stride + i % K
    tl.store(out_ptr + at, value.to(out_ptr.dtype.element_ty), mask=i < elements)


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
    stored, per = packed.contiguous().view(-1).view(torch.uint8), 2
    if stored.numel() % 4 == 0 and blocksize % 8 == 0 and stored.data_ptr() % 4 == 0:
        stored, per = stored.view(torch.int32), 8
    kernel[(-(-rows * cols // _ELEMENTS),)](
        stored, absmax, nested_absmax, nested_code, offset, op.code(quant_type, packed.device), out,
        rows * cols, cols, out.stride(0), nested_blocksize,
        BLOCKSIZE=blocksize, NESTED=nested_absmax is not None, OFFSET=offset is not None, APART=out.stride(0) != cols,
        PER=per, BLOCK=_ELEMENTS // per, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def serves(packed: torch.Tensor, absmax: torch.Tensor, rows: int, cols: int, dtype: torch.dtype, **_: Any) -> bool:
    whole = absmax.is_contiguous() and rows * cols > 0
    return whole and dtype in FLOATS and (dtype is not torch.bfloat16 or capability(packed.device) >= (8, 0))


def forward(packed: torch.Tensor, rows: int, cols: int, dtype: torch.dtype, **format_: Any) -> tuple[torch.Tensor]:
    out = empty(rows, cols, like=packed, dtype=dtype)
    decode_into(out, packed, **format_)
    return (out,)


op.dequantize_4bit.forms.accelerated.append(Form("triton", forward, op.backward, serves))
