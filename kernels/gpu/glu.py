"""Gated linear unit: `kernels/glu.py` has the formulas.

A program holds a tile of rows and columns, so gate and up may be the two halves of one fused projection's result. The
backward makes all that is wanted in one pass over its inputs: both gradients, and y itself for who did not keep it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels import glu as op
from fastlora.kernels.forms import Form, laid_out
from fastlora.kernels.gpu.launch import FLOATS, Rows, cdiv, power_of_two, supported
from fastlora.kernels.op import Gradients, Wanted

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")


@triton.jit
def _sigmoid(z):
    """sigmoid(z) and its derivative, both without cancellation and without an infinite intermediate."""
    e = tl.exp(-tl.abs(z))
    smaller = e / (1.0 + e)
    larger = 1.0 / (1.0 + e)
    return tl.where(z < 0, smaller, larger), smaller * larger


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """act(z) and act'(z). As (1 + tanh(u)) / 2 = sigmoid(2u), gelu_tanh is z sigmoid(v) with v = 2u; silu has v = z."""
    if ACTIVATION == "gelu":
        share = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        slope = share + z * (tl.exp(-0.5 * z * z) * 0.3989422804014327)
    elif ACTIVATION == "gelu_tanh":
        square = z * z
        share, density = _sigmoid(1.5957691216057308 * (z + 0.044715 * z * square))
        slope = share + z * density * (1.5957691216057308 * (1.0 + 0.134145 * square))
    else:
        share, density = _sigmoid(z)
        slope = share + z * density
    return z * share, slope


@triton.jit
def _offsets(T, I, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr):
    """Rows and columns of this program's tile; programs run along a row first."""
    across = tl.cdiv(I, BLOCK_I)
    row = tl.arange(0, BLOCK_T)[:, None].to(tl.int64) + (tl.program_id(0) // across) * BLOCK_T
    cols = tl.arange(0, BLOCK_I)[None, :] + (tl.program_id(0) % across) * BLOCK_I
    return row, cols, (row < T) & (cols < I)


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    gate_ptr, up_ptr, y_ptr, T, I, gate_stride, up_stride, y_stride,
    ACTIVATION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """y = act(gate) * up, for BLOCK_T rows and BLOCK_I columns."""
    row, cols, mask = _offsets(T, I, BLOCK_T, BLOCK_I)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    act, _ = _activate(gate, ACTIVATION)
    tl.store(y_ptr + row * y_stride + cols, (act * up).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def backward_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, y_ptr,
    T, I, dy_stride, gate_stride, up_stride, dgate_stride, dup_stride, y_stride,
    ACTIVATION: tl.constexpr, DGATE: tl.constexpr, DUP: tl.constexpr, Y: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """dgate = dy * up * act'(gate), dup = dy * act(gate) and y = act(gate) * up, for BLOCK_T rows, BLOCK_I columns."""
    row, cols, mask = _offsets(T, I, BLOCK_T, BLOCK_I)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    act, slope = _activate(gate, ACTIVATION)
    dy = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
    if DGATE or DUP:
        dy = tl.load(dy_ptr + row * dy_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if DUP:
        tl.store(dup_ptr + row * dup_stride + cols, (dy * act).to(dup_ptr.dtype.element_ty), mask=mask)
    if DGATE or Y:
        up = tl.load(up_ptr + row * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
        if DGATE:
            dgate = dy * up * slope
            tl.store(dgate_ptr + row * dgate_stride + cols, dgate.to(dgate_ptr.dtype.element_ty), mask=mask)
        if Y:
            tl.store(y_ptr + row * y_stride + cols, (act * up).to(y_ptr.dtype.element_ty), mask=mask)


def tile(T: int, I: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, 16 elements for each thread, and how many programs there are."""
    block_i = min(power_of_two(I), 1024)
    block_t = 2048 // block_i
    return block_t, block_i, cdiv(T, block_t) * cdiv(I, block_i)


def run_forward(gate: torch.Tensor, up: torch.Tensor, activation: str, y: torch.Tensor) -> None:
    """Writes y. All are matrices of one shape with contiguous rows, any distance apart."""
    T, I = gate.shape
    block_t, block_i, programs = tile(T, I)
    forward_kernel[(programs,)](
        gate, up, y, T, I, gate.stride(0), up.stride(0), y.stride(0),
        ACTIVATION=activation, BLOCK_T=block_t, BLOCK_I=block_i, num_warps=4,
    )  # fmt: skip


def run_backward(
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    dgate: torch.Tensor | None = None,
    dup: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
) -> None:
    """Writes whichever of dgate, dup and y are given, in one launch.

    All are matrices of one shape with contiguous rows, any distance apart: dgate and dup may be the halves of a matrix,
    y the left part of a wider one. Each is rounded to its own dtype.
    """
    T, I = gate.shape
    block_t, block_i, programs = tile(T, I)
    strides = [0 if t is None else t.stride(0) for t in (dy, gate, up, dgate, dup, y)]
    backward_kernel[(programs,)](
        dy, gate, up, dgate, dup, y, T, I, *strides,
        ACTIVATION=activation, DGATE=dgate is not None, DUP=dup is not None, Y=y is not None,
        BLOCK_T=block_t, BLOCK_I=block_i, num_warps=4,
    )  # fmt: skip


def serves(gate: torch.Tensor, up: torch.Tensor, activation: str, out_dtype: torch.dtype, **_: Any) -> bool:
    return (
        activation in ACTIVATIONS
        and out_dtype in FLOATS
        and gate.dim() > 0
        and gate.numel() > 0
        and gate.shape == up.shape
        and supported(gate, up)
    )


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str, out_dtype: torch.dtype) -> tuple[torch.Tensor]:
    rows = Rows(gate)
    y = rows.empty(gate.shape[-1], out_dtype)
    run_forward(rows.of(gate), rows.of(up), activation, rows.of(y))
    return (laid_out(y, gate),)


def serves_backward(grads: list[torch.Tensor], gate: torch.Tensor, **given: Any) -> bool:
    return serves(gate, **given) and supported(*grads)


def backward_with_hidden(
    wanted: Wanted,
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    hidden_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dgate and dup as far as they are wanted, and y in `hidden_dtype` unless that is None; all in one launch."""
    rows, I = Rows(gate), gate.shape[-1]
    dgate = rows.empty(I, gate.dtype) if wanted["gate"] else None
    dup = rows.empty(I, up.dtype) if wanted["up"] else None
    y = None if hidden_dtype is None else rows.empty(I, hidden_dtype)
    results = [t if t is None else rows.of(t) for t in (dgate, dup, y)]
    run_backward(rows.of(dy), rows.of(gate), rows.of(up), activation, *results)
    return (
        None if dgate is None else laid_out(dgate, gate),
        None if dup is None else laid_out(dup, up),
        None if y is None else laid_out(y, gate),
    )


def backward(
    wanted: Wanted, grads: list[torch.Tensor], gate: torch.Tensor, up: torch.Tensor, activation: str, **_: Any
) -> Gradients:
    gradients = backward_with_hidden(wanted, grads[0], gate, up, activation, None)
    return dict(zip(("gate", "up"), gradients, strict=False))


op.glu.forms.accelerated.append(Form("triton", forward, backward, serves, serves_backward))
