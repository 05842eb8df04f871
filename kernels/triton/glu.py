"""Gated linear unit: `kernels/formulas/glu.py` has the formulas.

Rows of all operands may have any stride, so gate and up may be the two halves of a fused projection's output. The
backward computes both gradients, and optionally recomputes y, in one pass over its inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import FLOAT_DTYPES, supported
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.implementations import with_strides_of
from fastlora.kernels.formulas import glu as op
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import Rows, cdiv, power_of_two

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")

# Measured on an H200, bfloat16, 3,072 to 18,944 columns.
WARPS = 4
ELEMENTS, LARGE_ELEMENTS = 4, 8
"""Elements per thread, in general and in the forward of a large matrix."""
LARGE = 1 << 21
"""Elements above which a matrix is large: fewer threads with more loads in flight each are then faster."""


@triton.jit
def _sigmoid(z):
    """Return sigmoid(z) and its derivative, without cancellation or overflow."""
    e = tl.exp(-tl.abs(z))
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(z < 0, smaller, larger), smaller * larger


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """Return act(z) and act'(z).

    All activations have the form z * cdf(z). Since (1 + tanh(u)) / 2 = sigmoid(2u), gelu_tanh is z * sigmoid(2u).
    """
    if ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        slope = cdf + z * (tl.exp(-0.5 * z * z) * 0.3989422804014327)
    elif ACTIVATION == "gelu_tanh":
        square = z * z
        cdf, density = _sigmoid(1.5957691216057308 * (z + 0.044715 * z * square))
        slope = cdf + z * density * (1.5957691216057308 * (1.0 + 0.134145 * square))
    else:
        cdf, density = _sigmoid(z)
        slope = cdf + z * density
    return z * cdf, slope


@triton.jit
def _offsets(I, ONE_ROW: tl.constexpr, BLOCK_I: tl.constexpr):
    """Return the program's row, its first column, column offsets from there, and their mask."""
    cols = tl.arange(0, BLOCK_I)
    if ONE_ROW:
        row = 0
        start = tl.program_id(0).to(tl.int64) * BLOCK_I
    else:
        blocks = tl.cdiv(I, BLOCK_I)
        row = (tl.program_id(0) // blocks).to(tl.int64)
        start = (tl.program_id(0) % blocks) * BLOCK_I
    return row, start, cols, cols < I - start


@precompile.kernel()
def forward_kernel(
    gate_ptr, up_ptr, y_ptr, I, gate_stride, up_stride, y_stride,
    ACTIVATION: tl.constexpr, ONE_ROW: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """y = act(gate) * up, for BLOCK_I columns of a row."""
    row, start, cols, mask = _offsets(I, ONE_ROW, BLOCK_I)
    gate = tl.load(gate_ptr + row * gate_stride + start + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + start + cols, mask=mask, other=0.0).to(tl.float32)
    act, _ = _activate(gate, ACTIVATION)
    tl.store(y_ptr + row * y_stride + start + cols, (act * up).to(y_ptr.dtype.element_ty), mask=mask)


@precompile.kernel()
def backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, y_ptr,
    I, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride, y_stride,
    ACTIVATION: tl.constexpr, DGATE: tl.constexpr, DUP: tl.constexpr, Y: tl.constexpr,
    ONE_ROW: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """dgate = dy * up * act'(gate), dup = dy * act(gate) and y = act(gate) * up, for BLOCK_I columns of a row."""
    row, start, cols, mask = _offsets(I, ONE_ROW, BLOCK_I)
    gate = tl.load(gate_ptr + row * gate_stride + start + cols, mask=mask, other=0.0).to(tl.float32)
    if DGATE or DUP:
        dy = tl.load(dy_ptr + row * dy_stride + start + cols, mask=mask, other=0.0).to(tl.float32)
    if DGATE or Y:
        up = tl.load(up_ptr + row * up_stride + start + cols, mask=mask, other=0.0).to(tl.float32)
    act, slope = _activate(gate, ACTIVATION)
    if DUP:
        dup = (dy * act).to(dup_ptr.dtype.element_ty)
        tl.store(dup_ptr + row * dup_stride + start + cols, dup, mask=mask)
    if DGATE:
        dgate = (dy * up * slope).to(dgate_ptr.dtype.element_ty)
        tl.store(dgate_ptr + row * dgate_stride + start + cols, dgate, mask=mask)
    if Y:
        tl.store(y_ptr + row * y_stride + start + cols, (act * up).to(y_ptr.dtype.element_ty), mask=mask)


def _plan(matrices: Sequence[torch.Tensor | None], large: int) -> tuple[int, int, list[int], dict[str, Any]]:
    """Return the number of programs, the number of columns, the row stride of each matrix, and the kernels' constants.

    If all matrices are contiguous, they are treated as one row. `large` is the number of elements per thread for large
    matrices.
    """
    T, I = next(t.shape for t in matrices if t is not None)
    strides = [I if t is None else t.stride(0) for t in matrices]
    if all(stride == I for stride in strides):
        T, I = 1, T * I
    elements = large if T * I >= LARGE else ELEMENTS
    block = min(power_of_two(I), 32 * WARPS * elements)
    constants = {"ONE_ROW": T == 1, "BLOCK_I": block, "num_warps": max(1, block // (32 * elements))}
    return T * cdiv(I, block), I, strides, constants


def run_forward(gate: torch.Tensor, up: torch.Tensor, activation: str, y: torch.Tensor) -> None:
    """Write act(gate) * up to y. All are matrices of one shape with contiguous rows of any row stride."""
    programs, I, strides, constants = _plan((gate, up, y), LARGE_ELEMENTS)
    forward_kernel[(programs,)](gate, up, y, I, *strides, ACTIVATION=activation, **constants)


def run_backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dgate: torch.Tensor | None = None,
    dup: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
) -> None:
    """Write whichever of dgate, dup and y are given, in one launch.

    All are matrices of one shape with contiguous rows of any row stride. Each output is rounded to its own dtype, and
    may share memory with an input.
    """
    programs, I, strides, constants = _plan((dy, gate, up, dgate, dup, y), ELEMENTS)
    backward_kernel[(programs,)](
        dy, gate, up, dgate, dup, y, I, *strides,
        ACTIVATION=activation, DGATE=dgate is not None, DUP=dup is not None, Y=y is not None, **constants,
    )  # fmt: skip


def serves(gate: torch.Tensor, up: torch.Tensor, activation: str, out_dtype: torch.dtype, **_: Any) -> bool:
    return (
        activation in ACTIVATIONS
        and out_dtype in FLOAT_DTYPES
        and gate.dim() > 0
        and gate.numel() > 0
        and gate.shape == up.shape
        and supported(gate, up)
    )


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str, out_dtype: torch.dtype) -> tuple[torch.Tensor]:
    rows = Rows(gate)
    y = rows.empty(gate.shape[-1], out_dtype)
    run_forward(rows.as_matrix(gate), rows.as_matrix(up), activation, rows.as_matrix(y))
    return (with_strides_of(y, gate),)


def serves_backward(grads: list[torch.Tensor], gate: torch.Tensor, **given: Any) -> bool:
    return serves(gate, **given) and supported(*grads)


def backward(
    wanted: Wanted, grads: list[torch.Tensor], gate: torch.Tensor, up: torch.Tensor, activation: str, **_: Any
) -> Gradients:
    rows, I = Rows(gate), gate.shape[-1]
    inputs = {"gate": gate, "up": up}
    gradients = {name: rows.empty(I, t.dtype) for name, t in inputs.items() if wanted[name]}
    results = [rows.as_matrix(gradients[name]) if name in gradients else None for name in inputs]
    run_backward(rows.as_matrix(grads[0]), rows.as_matrix(gate), rows.as_matrix(up), activation, *results)
    return {name: with_strides_of(t, inputs[name]) for name, t in gradients.items()}


op.glu.implementation(
    "triton",
    forward=forward,
    backward=backward,
    serves=serves,
    serves_backward=serves_backward,
    traceable=True,
)
