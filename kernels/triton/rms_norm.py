"""RMSNorm, alone and after the residual addition: `kernels/formulas/rms_norm.py` has the formulas.

A program holds whole rows in registers, in float32, so each element is loaded and stored once. The backward without a
weight gradient has one program per few rows. With one, persistent programs loop over the rows, each with a partial sum
of dw in registers; these are then added in a fixed order, so results are deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import supported
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.implementations import with_strides_of
from fastlora.kernels.formulas import residual_add
from fastlora.kernels.formulas import rms_norm as op
from fastlora.kernels.triton.blocks import row_reduce
from fastlora.kernels.triton.dropout import dropout_arguments, row_factors
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import TL_DTYPES, Rows, vector


@triton.jit
def _scale(w, offset, SCALE_DTYPE: tl.constexpr):
    """Return offset + w, rounded to SCALE_DTYPE as in the model."""
    w = w.to(tl.float32).to(SCALE_DTYPE)
    return (w.to(tl.float32) + offset).to(SCALE_DTYPE).to(tl.float32)


@precompile.kernel(do_not_specialize=["T", "eps", "offset", "threshold", "scale"])
def forward_kernel(
    x_ptr, residual_ptr, w_ptr, y_ptr, total_ptr, rstd_ptr,
    T, H, x_stride, residual_stride, y_stride, eps, offset, seed_ptr, threshold, scale, MULTIPLE_OF_4: tl.constexpr,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, NORM_DTYPE: tl.constexpr, SCALE_DTYPE: tl.constexpr,
    EVICTION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """total = residual + x (* m); y = total * rsqrt(mean(total^2) + eps) * (offset + w), for BLOCK_T rows."""
    row = tl.arange(0, BLOCK_T)[:, None].to(tl.int64) + tl.program_id(0) * BLOCK_T
    cols = tl.arange(0, BLOCK_H)[None, :]
    mask = (row < T) & (cols < H)
    h = row_reduce.load_float32(x_ptr + row * x_stride + cols, mask, EVICTION)
    if WEIGHT:  # loaded early, to overlap with the reduction
        w = tl.load(w_ptr + cols, mask=cols < H, other=0.0)
    if ADD:
        residual = row_reduce.load_float32(residual_ptr + row * residual_stride + cols, mask, EVICTION)
        if seed_ptr is not None:
            h *= row_factors(row, H, seed_ptr, threshold, scale, MULTIPLE_OF_4, BLOCK_T, BLOCK_H)
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
    T, H, dy_stride, h_stride, dtotal_stride, seed_ptr, threshold, scale, MULTIPLE_OF_4: tl.constexpr,
    DTOTAL: tl.constexpr, DH: tl.constexpr, DX: tl.constexpr,
    EVICTION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Store dh and dx of BLOCK_T rows; return dy * n."""
    row = tl.arange(0, BLOCK_T)[:, None].to(tl.int64) + tile * BLOCK_T
    mask = (row < T) & (cols < H)
    rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)
    n = row_reduce.load_float32(h_ptr + row * h_stride + cols, mask, EVICTION) * rstd
    dy = row_reduce.load_float32(dy_ptr + row * dy_stride + cols, mask, EVICTION)
    if DH or DX:
        if DTOTAL:  # loaded early, to overlap with the reduction
            dtotal = row_reduce.load_float32(dtotal_ptr + row * dtotal_stride + cols, mask, EVICTION)
        g = dy * weight
        dh = rstd * (g - n * (tl.sum(g * n, axis=1, keep_dims=True) / H))
        if DTOTAL:
            dh += dtotal
        if DH:
            tl.store(dh_ptr + row * H + cols, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        if DX:
            dx = dh * row_factors(row, H, seed_ptr, threshold, scale, MULTIPLE_OF_4, BLOCK_T, BLOCK_H)
            tl.store(dx_ptr + row * H + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    return dy * n


@precompile.kernel(do_not_specialize=["T", "offset", "threshold", "scale"])
def backward_kernel(
    dy_ptr, h_ptr, w_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr, dw_ptr,
    T, H, dy_stride, h_stride, dtotal_stride, offset, seed_ptr, threshold, scale, MULTIPLE_OF_4: tl.constexpr,
    WEIGHT: tl.constexpr, DTOTAL: tl.constexpr, DH: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr,
    SCALE_DTYPE: tl.constexpr, EVICTION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dh = rstd * (g - n * mean(g * n)) + dtotal and dx = dh * m, for BLOCK_T rows.

    If DW, for every num_programs-th block of rows, with a partial sum of dw = dy * n over these.
    """
    cols = tl.arange(0, BLOCK_H)[None, :]
    weight = tl.full((1, BLOCK_H), 1.0, tl.float32)
    if WEIGHT:
        weight = _scale(tl.load(w_ptr + cols, mask=cols < H, other=0.0), offset, SCALE_DTYPE)
    if DW:
        dw = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.num_programs(0)):
            dw += _backward_rows(
                tile, weight, cols, dy_ptr, h_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr,
                T, H, dy_stride, h_stride, dtotal_stride, seed_ptr, threshold, scale, MULTIPLE_OF_4,
                DTOTAL, DH, DX, EVICTION, BLOCK_T, BLOCK_H,
            )  # fmt: skip
        partial = tl.sum(dw, axis=0, keep_dims=True)
        tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * H + cols, partial, mask=cols < H)
    else:
        _backward_rows(
            tl.program_id(0), weight, cols, dy_ptr, h_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr,
            T, H, dy_stride, h_stride, dtotal_stride, seed_ptr, threshold, scale, MULTIPLE_OF_4,
            DTOTAL, DH, DX, EVICTION, BLOCK_T, BLOCK_H,
        )  # fmt: skip


def _normalize(
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
    """Return y (..., H) in `out_dtype`, the sum (x if there is no residual), and float32 rstd (..., 1)."""
    if residual is not None:
        x = row_reduce.with_strides_of_sum(x, residual)
    rows, H = Rows(x, keep_order=seed is not None), x.shape[-1]
    matrix = rows.as_matrix(x)
    added = matrix if residual is None else rows.as_matrix(residual)
    y, rstd = rows.empty(H, out_dtype), rows.empty(1, torch.float32)
    total = x if residual is None else rows.empty(H, torch.promote_types(x.dtype, residual.dtype))
    programs, plan = row_reduce.plan(rows.count, H, x.device, fp_fusion=seed is None)
    forward_kernel[(programs,)](
        matrix, added, vector(weight), y, total, rstd,
        rows.count, H, matrix.stride(0), added.stride(0), H, eps, offset, *dropout_arguments(x, seed, dropout),
        ADD=residual is not None, WEIGHT=weight is not None,
        NORM_DTYPE=TL_DTYPES[norm_dtype], SCALE_DTYPE=TL_DTYPES[scale_dtype], **plan,
    )  # fmt: skip
    return with_strides_of(y, x), total if residual is None else with_strides_of(total, x), rstd.contiguous()


def _differentiate(
    needs_dh: bool,
    needs_dx: bool,
    needs_dw: bool,
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
    """Return dh and dx (= dh with dropout) in h's dtype and strides, and dw.

    h is the input of the norm: x or the sum; dtotal, the gradient of the sum itself, is added to dh.
    """
    rows, H = Rows(h, keep_order=seed is not None), h.shape[-1]
    matrix, dy_rows = rows.as_matrix(h), rows.as_matrix(dy)
    dtotal_rows = dy_rows if dtotal is None else rows.as_matrix(dtotal)
    persistent = needs_dw and weight is not None
    programs, plan = row_reduce.plan(rows.count, H, h.device, persistent)
    dh, dx = (rows.empty(H, h.dtype) if needs else None for needs in (needs_dh, needs_dx))
    dw = row_reduce.allocate_partials(programs, needs_dw, weight)
    backward_kernel[(programs,)](
        dy_rows, matrix, vector(weight), rows.as_matrix(rstd), dtotal_rows, dh, dx, dw,
        rows.count, H, dy_rows.stride(0), matrix.stride(0), dtotal_rows.stride(0), offset,
        *dropout_arguments(h, seed, dropout),
        WEIGHT=weight is not None, DTOTAL=dtotal is not None, DH=needs_dh, DX=needs_dx, DW=dw is not None,
        SCALE_DTYPE=TL_DTYPES[scale_dtype], **plan,
    )  # fmt: skip
    dh, dx = (None if gradient is None else with_strides_of(gradient, h) for gradient in (dh, dx))
    return dh, dx, row_reduce.reduce_partials(dw, weight)


def serves(x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None = None, **given: Any) -> bool:
    dtypes = (given["norm_dtype"], given["scale_dtype"], given["out_dtype"])
    return (
        given["compute_dtype"] is torch.float32
        and all(dtype in TL_DTYPES for dtype in dtypes)
        and 0 < x.shape[-1] <= row_reduce.MAX_H
        and x.numel() > 0
        and (residual is None or residual.shape == x.shape)
        and supported(x, weight, residual)
    )


def forward(x: torch.Tensor, weight: torch.Tensor | None, **attributes: Any) -> tuple[torch.Tensor, torch.Tensor]:
    y, _, rstd = _normalize(x, None, weight, **attributes)
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
    needs = wanted["x"], False, wanted["weight"]
    dh, _dx, dw = _differentiate(*needs, grads[0], None, x, weight, rstd, offset, scale_dtype)
    return {"x": dh, "weight": dw}


def add_forward(
    residual: torch.Tensor, x: torch.Tensor, weight: torch.Tensor | None, **attributes: Any
) -> tuple[torch.Tensor, ...]:
    return _normalize(x, residual, weight, **attributes)


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
    needs = wanted["residual"], wanted["x"], wanted["weight"]
    dresidual, dx, dw = _differentiate(*needs, dy, dtotal, total, weight, rstd, offset, scale_dtype, seed, dropout)
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
