"""Decodes 4-bit weights, as bitsandbytes stores them, into a matrix.

    W_i = (code[q_i] * absmax[i // blocksize]).to(dtype)

q_i are 4-bit indices in row-major order, two per byte, high nibble first; code has the 16 values of NF4 or FP4.  With
double quantization the scales are bytes themselves, decoded in float32 with a rounding after each step:

    absmax[j] = nested_code[scale_j] * nested_absmax[j // nested_blocksize] + offset

Weights are frozen, so there is no backward.

Shapes: packed of rows * cols / 2 bytes, absmax of one entry per block, nested_code (256,), offset (), result
(rows, cols).  Sources: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (2023) for NF4 and double
quantization; FP4 is bitsandbytes' format of sign, 2 exponent bits and 1 mantissa bit, scaled to a maximum of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.kernels.core import dispatch
from fastlora.kernels.core.cost import Cost, Work
from fastlora.kernels.core.library import register_op

_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_FP4 = (0.0, 0.0052083333333333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
CODES = {"nf4": _NF4, "fp4": (*_FP4, *(-value for value in _FP4))}


def _cached_table(make: Callable[[str, torch.device], torch.Tensor]) -> Callable[[str, torch.device], torch.Tensor]:
    """Cache a table by format and device, except while a dispatch mode is active, which may make it a fake tensor."""
    cached = cache(lambda *key: dispatch.constant(make(*key)))

    @wraps(make)
    def table(quant_type: str, device: torch.device) -> torch.Tensor:
        return (make if dispatch.mode_is_active() else cached)(quant_type, device)

    return table


@_cached_table
def code(quant_type: str, device: torch.device) -> torch.Tensor:
    """Return the 16 values of a format, in float32.

    Raises:
        ValueError: for an unknown format.
    """
    if quant_type not in CODES:
        raise ValueError(f"dequantize_4bit: quant_type must be one of {', '.join(CODES)}; got {quant_type!r}")
    return torch.tensor(CODES[quant_type], dtype=torch.float32, device=device)


@_cached_table
def pairs(quant_type: str, device: torch.device) -> torch.Tensor:
    """Return the two values of each byte, (256, 2) in float32."""
    byte = torch.arange(256, device=device)
    return code(quant_type, device)[torch.stack((byte >> 4, byte & 15), dim=-1)]


def scales(
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    nested_blocksize: int,
) -> torch.Tensor:
    """Return the scale of each block, in float32."""
    if nested_absmax is None or nested_code is None:
        return absmax.float()
    block = torch.arange(absmax.numel(), device=absmax.device) // nested_blocksize
    decoded = nested_code.float()[absmax.long()] * nested_absmax.float()[block]
    return decoded if offset is None else decoded + offset.float()


def reference(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor | None,
    nested_code: torch.Tensor | None,
    offset: torch.Tensor | None,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the decoded matrix, (rows, cols) in `dtype`."""
    stored = packed.contiguous().view(torch.uint8).reshape(-1)
    indices = torch.stack((stored >> 4, stored & 15), dim=-1).flatten()[: rows * cols]
    block = torch.arange(rows * cols, device=packed.device) // blocksize
    scale = scales(absmax, nested_absmax, nested_code, offset, nested_blocksize)[block]
    return (code(quant_type, packed.device)[indices.long()] * scale).to(dtype).view(rows, cols)


def forward(
    packed: torch.Tensor, blocksize: int, quant_type: str, rows: int, cols: int, dtype: torch.dtype, **scaling: Any
) -> tuple[torch.Tensor]:
    """Compute `reference` with one lookup per byte, and one scale per block."""
    stored = packed.contiguous().view(torch.uint8).reshape(-1)
    values = pairs(quant_type, packed.device)[stored.int()].flatten()
    scale = scales(**scaling)
    blocks = F.pad(values, (0, len(scale) * blocksize - len(values))).view(-1, blocksize)
    return ((blocks * scale[:, None]).to(dtype).view(-1)[: rows * cols].view(rows, cols),)


dequantize_4bit = register_op(
    "dequantize_4bit",
    family="quant",
    schema=(
        "(Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, int blocksize, "
        "int nested_blocksize, str quant_type, int rows, int cols, ScalarType dtype) -> (Tensor weight)"
    ),
    outputs=1,
    reference=reference,
    forward=forward,
    traceable=True,
    saves=(),
    choices={"quant_type": tuple(CODES)},
    cost=Cost(forward=Work(flops="2*N*K", bytes="N*K*b + N*K/2 + N*K/S"), backward=Work(flops="0", bytes="0")),
)
