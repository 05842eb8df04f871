"""RMSNorm, alone and after the residual addition: `kernels/formulas/rms_norm.py` has the formulas.

A program holds whole rows, in float32, so each element is loaded once and stored once. The backward without a weight
gradient has a program per few rows. With one, as many programs as the GPU runs at a time walk over the rows and each
sums its share of dw in registers; the shares are then added up in a fixed order, so two runs give equal bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import supported
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.implementations import laid_out
from fastlora.kernels.formulas import residual_add
from fastlora.kernels.formulas import rms_norm as op
from fastlora.kernels.triton.blocks import row_reduce as over
from fastlora.kernels.triton.dropout import drawing, row_factors
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import TL_DTYPES, Rows, vector


@triton.jit
def _scale(w, offset, SCALE_DTYPE: tl.constexpr):
    """offset + w, rounded to SCALE_DTYPE as the model has it."""
    w = w.to(tl.float32).to(SCALE_DTYPE)
    return (w.to(tl.float32) + offset).to(SCALE_DTYPE).to(tl.float32)


@precompile.kernel(do_not_specialize=["T", "eps", "offset", "threshold", "scale"])
def forward_kernel(
    x_ptr, residual_ptr, w_ptr, y_ptr, total_ptr, rstd_ptr,
    T, H, x_stride, residual_stride, y_stride, eps, offset, seed_ptr, threshold, scale, FOURS: tl.constexpr,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, NORM_DTYPE: tl.constexpr, SCALE_DTYPE: tl.constexpr,
    READ: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """total = residual + x (* m); y = total * rsqrt(mean(total^2) + eps) * (offset + w), for BLOCK_T rows."""
    row = tl.arange(0, BLOCK_T)[:, None].to(tl.int64) + tl.program_id(0) * BLOCK_T
    cols = tl.arange(0, BLOCK_H)[None, :]
    mask = (row < T) & (cols < H)
    h = over.read(x_ptr + row * x_stride + cols, mask, READ)
    if WEIGHT:  # on its way while the row is summed
        w = tl.load(w_ptr + cols, mask=cols < H, other=0.0)
    if ADD:
        residual = over.read(residual_ptr + row * residual_stride + cols, mask, READ)
        if seed_ptr is not None:
            h *= row_factors(row, H, seed_ptr, threshold, scale, FOURS, BLOCK_T, BLOCK_H)
            h = h.to(x_ptr.dtype.element_ty).to(tl.float32)
        total = (residual + h).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * H + cols, total, mask=mask)
        h = total.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(h * h, axis=1, keep_dims=True) / H + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < T)
    n = (h * rstd).to(NORM_DTYPE).to(tl.float32)
    if WEIGHT:
        n = n * _scale(w, offset, SCALE_DTYPE)
    tl.store(y_ptr + row * y_stride + cols, n.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_rows(
    tile, weight, cols, dy_ptr, h_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr,
    T, H, dy_stride, h_stride, dtotal_stride, seed_ptr, threshold, scale, FOURS: tl.constexpr,
    DTOTAL: tl.constexpr, DH: tl.constexpr, DX: tl.constexpr,
    READ: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Stores dh and dx of BLOCK_T rows; returns their dy * n."""
    row = tl.arange(0, BLOCK_T)[:, None].to(tl.int64) + tile * BLOCK_T
    mask = (row < T) & (cols < H)
    rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)
    n = over.read(h_ptr + row * h_stride + cols, mask, READ) * rstd
    dy = over.read(dy_ptr + row * dy_stride + cols, mask, READ)
    if DH or DX:
        if DTOTAL:  # on its way while the row is summed
            through = over.read(dtotal_ptr + row * dtotal_stride + cols, mask, READ)
        g = dy * weight
        dh = rstd * (g - n * (tl.sum(g * n, axis=1, keep_dims=True) / H))
        if DTOTAL:
            dh += through
        if DH:
            tl.store(dh_ptr + row * H + cols, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        if DX:
            dx = dh * row_factors(row, H, seed_ptr, threshold, scale, FOURS, BLOCK_T, BLOCK_H)
            tl.store(dx_ptr + row * H + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    return dy * n


@precompile.kernel(do_not_specialize=["T", "offset", "threshold", "scale"])
def backward_kernel(
    dy_ptr, h_ptr, w_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr, dw_ptr,
    T, H, dy_stride, h_stride, dtotal_stride, offset, seed_ptr, threshold, scale, FOURS: tl.constexpr,
    WEIGHT: tl.constexpr, DTOTAL: tl.constexpr, DH: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr,
    SCALE_DTYPE: tl.constexpr, READ: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dh = rstd * (g - n * mean(g * n)) + dtotal, and dx = dh * m, for BLOCK_T rows; if DW for every num_programs-th
    BLOCK_T of them, and the sum of their dy * n."""
    cols = tl.arange(0, BLOCK_H)[None, :]
    weight = tl.full((1, BLOCK_H), 1.0, tl.float32)
    if WEIGHT:
        weight = _scale(tl.load(w_ptr + cols, mask=cols < H, other=0.0), offset, SCALE_DTYPE)
    if DW:
        dw = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.num_programs(0)):
            dw += _backward_rows(
                tile, weight, cols, dy_ptr, h_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr,
                T, H, dy_stride, h_stride, dtotal_stride, seed_ptr, threshold, scale, FOURS,
                DTOTAL, DH, DX, READ, BLOCK_T, BLOCK_H,
            )  # fmt: skip
        share = tl.sum(dw, axis=0, keep_dims=True)
        tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * H + cols, share, mask=cols < H)
    else:
        _backward_rows(
            tl.program_id(0), weight, cols, dy_ptr, h_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr,
            T, H, dy_stride, h_stride, dtotal_stride, seed_ptr, threshold, scale, FOURS,
            DTOTAL, DH, DX, READ, BLOCK_T, BLOCK_H,
        )  # fmt: skip


def _normalise(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    norm_dtype: torch.dtype,
    scale_dtype: torch.dtype,
    out_dtype: torch.dtype,
    seed: torch.Tensor | None = None,
    dropout: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the sum (x if there is no residual) and rstd."""
    if residual is not None:
        x = over.as_summed(x, residual)
    rows, H = Rows(x, numbered=seed is not None), x.shape[-1]
    matrix = rows.of(x)
    added = matrix if residual is None else rows.of(residual)
    y, rstd = rows.empty(H, out_dtype), rows.empty(1, torch.float32)
    total = x if residual is None else rows.empty(H, torch.promote_types(x.dtype, residual.dtype))
    programs, plan = over.plan(rows.count, H, x.device, rounding=seed is not None)
    forward_kernel[(programs,)](
        matrix, added, vector(weight), y, total, rstd,
        rows.count, H, matrix.stride(0), added.stride(0), H, eps, offset, *drawing(x, seed, dropout),
        ADD=residual is not None, WEIGHT=weight is not None,
        NORM_DTYPE=TL_DTYPES[norm_dtype], SCALE_DTYPE=TL_DTYPES[scale_dtype], **plan,
    )  # fmt: skip
    return laid_out(y, x), total if residual is None else laid_out(total, x), rstd.contiguous()


def _differentiate(
    wants_dh: bool,
    wants_dx: bool,
    wants_dw: bool,
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    scale_dtype: torch.dtype,
    seed: torch.Tensor | None = None,
    dropout: float | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """The gradient of h, what was normed (for a sum, with the sum's own added), the same dropped out, and the
    weight's."""
    rows, H = Rows(h, numbered=seed is not None), h.shape[-1]
    matrix, incoming = rows.of(h), rows.of(dy)
    through = incoming if dtotal is None else rows.of(dtotal)
    walking = wants_dw and weight is not None
    programs, plan = over.plan(rows.count, H, h.device, walking)
    dh, dx = (rows.empty(H, h.dtype) if wants else None for wants in (wants_dh, wants_dx))
    dw = over.shares(programs, wants_dw, weight)
    backward_kernel[(programs,)](
        incoming, matrix, vector(weight), rows.of(rstd), through, dh, dx, dw,
        rows.count, H, incoming.stride(0), matrix.stride(0), through.stride(0), offset, *drawing(h, seed, dropout),
        WEIGHT=weight is not None, DTOTAL=dtotal is not None, DH=wants_dh, DX=wants_dx, DW=dw is not None,
        SCALE_DTYPE=TL_DTYPES[scale_dtype], **plan,
    )  # fmt: skip
    dh, dx = (None if gradient is None else laid_out(gradient, h) for gradient in (dh, dx))
    return dh, dx, over.total(dw, weight)


def serves(x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None = None, **given: Any) -> bool:
    dtypes = (given["norm_dtype"], given["scale_dtype"], given["out_dtype"])
    return (
        given["compute_dtype"] is torch.float32
        and all(dtype in TL_DTYPES for dtype in dtypes)
        and 0 < x.shape[-1] <= over.WIDEST
        and x.numel() > 0
        and (residual is None or residual.shape == x.shape)
        and supported(x, weight, residual)
    )


def forward(x: torch.Tensor, weight: torch.Tensor | None, **attributes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, rstd = _normalise(x, None, weight, **attributes)
    return y, rstd


def serves_backward(grads: list[torch.Tensor], x: torch.Tensor, **given: Any) -> bool:
    return serves(x, **given) and supported(*grads)


def backward(
    wanted: Wanted,
    grads: list[torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    scale_dtype: torch.dtype,
    **_: Any,
) -> Gradients:
    wants = wanted["x"], False, wanted["weight"]
    dh, _dx, dw = _differentiate(*wants, grads[0], None, x, weight, rstd, offset, scale_dtype)
    return {"x": dh, "weight": dw}


def add_forward(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, **attributes: Any
) -> tuple[torch.Tensor, ...]:
    return _normalise(x, residual, weight, **attributes)


def serves_add_backward(grads: list[torch.Tensor | None], total: torch.Tensor, **given: Any) -> bool:
    return serves(total, **given) and supported(*grads)


def add_backward(
    wanted: Wanted,
    grads: list[torch.Tensor | None],
    total: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    scale_dtype: torch.dtype,
    seed: torch.Tensor | None,
    dropout: float | None,
    **_: Any,
) -> Gradients:
    dy, dtotal = grads
    if dy is None:
        return residual_add.backward(wanted, None, dtotal, total, seed, dropout)
    wants = wanted["residual"], wanted["x"], wanted["weight"]
    dresidual, dx, dw = _differentiate(*wants, dy, dtotal, total, weight, rstd, offset, scale_dtype, seed, dropout)
    return {"residual": dresidual, "x": dx, "weight": dw}


op.rms_norm.implementation(
    "triton",
    forward=forward,
    backward=backward,
    serves=serves,
    serves_backward=serves_backward,
    traceable=True,
)
op.add_rms_norm.implementation(
    "triton",
    forward=add_forward,
    backward=add_backward,
    serves=serves,
    serves_backward=serves_add_backward,
    traceable=True,
)
