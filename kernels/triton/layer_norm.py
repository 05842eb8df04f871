"""LayerNorm, alone and after the residual addition: `kernels/formulas/layer_norm.py` has the formulas.

A program holds whole rows in registers, in float32, so the mean is known before the squares are summed, and each
element is loaded and stored once. The backward is structured like RMSNorm's: one program per few rows if only x
requires a gradient; otherwise persistent programs, each with a partial sum of dw and db, which are then added in a
fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import supported
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.implementations import with_strides_of
from fastlora.kernels.formulas import layer_norm as op
from fastlora.kernels.formulas import residual_add
from fastlora.kernels.triton.blocks import row_reduce
from fastlora.kernels.triton.dropout import dropout_arguments, row_factors
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import TL_DTYPES, Rows, vector


@precompile.kernel(do_not_specialize=["T", "eps", "threshold", "scale"])
def forward_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    T, H, x_stride, residual_stride, y_stride, eps, seed_ptr, threshold, scale, MULTIPLE_OF_4: tl.constexpr,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    EVICTION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """total = residual + x (* m); y = (total - mean) * rsqrt(mean((total - mean)^2) + eps) * w + b: BLOCK_T rows."""
    row = tl.arange(0, BLOCK_T)[:, None].to(tl.int64) + tl.program_id(0) * BLOCK_T
    cols = tl.arange(0, BLOCK_H)[None, :]
    in_row = cols < H
    mask = (row < T) & in_row
    h = row_reduce.load_float32(x_ptr + row * x_stride + cols, mask, EVICTION)
    if WEIGHT:  # loaded early, to overlap with the reductions
        w = tl.load(w_ptr + cols, mask=in_row, other=0.0)
    if BIAS:
        b = tl.load(b_ptr + cols, mask=in_row, other=0.0)
    if ADD:
        residual = row_reduce.load_float32(residual_ptr + row * residual_stride + cols, mask, EVICTION)
        if seed_ptr is not None:
            h *= row_factors(row, H, seed_ptr, threshold, scale, MULTIPLE_OF_4, BLOCK_T, BLOCK_H)
            h = h.to(x_ptr.dtype.element_ty).to(tl.float32)
        total = (residual + h).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * H + cols, total, mask=mask)
        h = total.to(tl.float32)
    mean = tl.sum(h, axis=1, keep_dims=True) / H
    centered = tl.where(in_row, h - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centered * centered, axis=1, keep_dims=True) / H + eps)
    tl.store(mean_ptr + row, mean, mask=row < T)
    tl.store(rstd_ptr + row, rstd, mask=row < T)
    y = centered * rstd
    if WEIGHT:
        y = y * w.to(tl.float32)
    if BIAS:
        y = y + b.to(tl.float32)
    tl.store(y_ptr + row * y_stride + cols, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_rows(
    tile, weight, cols, dy_ptr, h_ptr, mean_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr,
    T, H, dy_stride, h_stride, dtotal_stride, seed_ptr, threshold, scale, MULTIPLE_OF_4: tl.constexpr,
    DTOTAL: tl.constexpr, DH: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr,
    EVICTION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Store dh and dx of BLOCK_T rows; return dy * n, which is meaningful if DH, DX or DW, and dy."""
    row = tl.arange(0, BLOCK_T)[:, None].to(tl.int64) + tile * BLOCK_T
    mask = (row < T) & (cols < H)
    dy = row_reduce.load_float32(dy_ptr + row * dy_stride + cols, mask, EVICTION)
    n = dy
    if DH or DX or DW:
        mean = tl.load(mean_ptr + row, mask=row < T, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)
        h = row_reduce.load_float32(h_ptr + row * h_stride + cols, mask, EVICTION)
        if (DH or DX) and DTOTAL:  # loaded early, to overlap with the reductions
            dtotal = row_reduce.load_float32(dtotal_ptr + row * dtotal_stride + cols, mask, EVICTION)
        n = tl.where(mask, (h - mean) * rstd, 0.0)
    if DH or DX:
        g = dy * weight
        shift = tl.sum(g, axis=1, keep_dims=True) / H
        dh = rstd * (g - shift - n * (tl.sum(g * n, axis=1, keep_dims=True) / H))
        if DTOTAL:
            dh += dtotal
        if DH:
            tl.store(dh_ptr + row * H + cols, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        if DX:
            dx = dh * row_factors(row, H, seed_ptr, threshold, scale, MULTIPLE_OF_4, BLOCK_T, BLOCK_H)
            tl.store(dx_ptr + row * H + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    return dy * n, dy


@precompile.kernel(do_not_specialize=["T", "threshold", "scale"])
def backward_kernel(
    dy_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr, dw_ptr, db_ptr,
    T, H, dy_stride, h_stride, dtotal_stride, seed_ptr, threshold, scale, MULTIPLE_OF_4: tl.constexpr,
    WEIGHT: tl.constexpr, DTOTAL: tl.constexpr, DH: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr,
    EVICTION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dh = rstd * (g - mean(g) - n * mean(g * n)) + dtotal and dx = dh * m, for BLOCK_T rows.

    If DW or DB, for every num_programs-th block of rows, with partial sums of dw = dy * n and db = dy over these.
    """
    cols = tl.arange(0, BLOCK_H)[None, :]
    weight = tl.full((1, BLOCK_H), 1.0, tl.float32)
    if WEIGHT:
        weight = tl.load(w_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)
    if DW or DB:
        dw = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        db = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.num_programs(0)):
            dw_rows, db_rows = _backward_rows(
                tile, weight, cols, dy_ptr, h_ptr, mean_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr,
                T, H, dy_stride, h_stride, dtotal_stride, seed_ptr, threshold, scale, MULTIPLE_OF_4,
                DTOTAL, DH, DX, DW, EVICTION, BLOCK_T, BLOCK_H,
            )  # fmt: skip
            if DW:
                dw += dw_rows
            if DB:
                db += db_rows
        at = tl.program_id(0).to(tl.int64) * H + cols
        if DW:
            tl.store(dw_ptr + at, tl.sum(dw, axis=0, keep_dims=True), mask=cols < H)
        if DB:
            tl.store(db_ptr + at, tl.sum(db, axis=0, keep_dims=True), mask=cols < H)
    else:
        _backward_rows(
            tl.program_id(0), weight, cols, dy_ptr, h_ptr, mean_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr,
            T, H, dy_stride, h_stride, dtotal_stride, seed_ptr, threshold, scale, MULTIPLE_OF_4,
            DTOTAL, DH, DX, DW, EVICTION, BLOCK_T, BLOCK_H,
        )  # fmt: skip


def _normalize(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    seed: torch.Tensor | None = None,
    dropout: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y (..., H) in `out_dtype`, the sum (x if there is no residual), and float32 mean and rstd (..., 1)."""
    if residual is not None:
        x = row_reduce.with_strides_of_sum(x, residual)
    rows, H = Rows(x, keep_order=seed is not None), x.shape[-1]
    matrix = rows.as_matrix(x)
    added = matrix if residual is None else rows.as_matrix(residual)
    y, mean, rstd = rows.empty(H, out_dtype), rows.empty(1, torch.float32), rows.empty(1, torch.float32)
    total = x if residual is None else rows.empty(H, torch.promote_types(x.dtype, residual.dtype))
    programs, plan = row_reduce.plan(rows.count, H, x.device, fp_fusion=seed is None)
    forward_kernel[(programs,)](
        matrix, added, vector(weight), vector(bias), y, total, mean, rstd,
        rows.count, H, matrix.stride(0), added.stride(0), H, eps, *dropout_arguments(x, seed, dropout),
        ADD=residual is not None, WEIGHT=weight is not None, BIAS=bias is not None, **plan,
    )  # fmt: skip
    total = total if residual is None else with_strides_of(total, x)
    return y.contiguous(), total, mean.contiguous(), rstd.contiguous()


def _differentiate(
    needs_dh: bool,
    needs_dx: bool,
    wanted: Wanted,
    dy: torch.Tensor,
    dtotal: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    seed: torch.Tensor | None = None,
    dropout: float | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, Gradients]:
    """Return dh and dx (= dh with dropout) in h's dtype and strides, and the gradients of weight and bias.

    h is the input of the norm: x or the sum; dtotal, the gradient of the sum itself, is added to dh.
    """
    rows, H = Rows(h, keep_order=seed is not None), h.shape[-1]
    matrix, dy_rows = rows.as_matrix(h), rows.as_matrix(dy)
    dtotal_rows = dy_rows if dtotal is None else rows.as_matrix(dtotal)
    persistent = (weight is not None and wanted["weight"]) or (bias is not None and wanted["bias"])
    programs, plan = row_reduce.plan(rows.count, H, h.device, persistent)
    dh, dx = (rows.empty(H, h.dtype) if needs else None for needs in (needs_dh, needs_dx))
    dw, db = (
        row_reduce.allocate_partials(programs, wanted["weight"], weight),
        row_reduce.allocate_partials(programs, wanted["bias"], bias),
    )
    backward_kernel[(programs,)](
        dy_rows, matrix, vector(weight), rows.as_matrix(mean), rows.as_matrix(rstd), dtotal_rows, dh, dx, dw, db,
        rows.count, H, dy_rows.stride(0), matrix.stride(0), dtotal_rows.stride(0), *dropout_arguments(h, seed, dropout),
        WEIGHT=weight is not None, DTOTAL=dtotal is not None, DH=needs_dh, DX=needs_dx,
        DW=dw is not None, DB=db is not None, **plan,
    )  # fmt: skip
    dh, dx = (None if gradient is None else with_strides_of(gradient, h) for gradient in (dh, dx))
    return dh, dx, {"weight": row_reduce.reduce_partials(dw, weight), "bias": row_reduce.reduce_partials(db, bias)}


def serves(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    **_: Any,
) -> bool:
    return (
        out_dtype in TL_DTYPES
        and x.numel() > 0
        and x.shape[-1] <= row_reduce.MAX_H
        and (residual is None or residual.shape == x.shape)
        and supported(x, weight, bias, residual)
    )


def forward(x: torch.Tensor, **given: Any) -> tuple[torch.Tensor, ...]:
    y, _, mean, rstd = _normalize(x, None, **given)
    return y, mean, rstd


def serves_backward(grads: list[torch.Tensor], x: torch.Tensor, **given: Any) -> bool:
    return serves(x, **given) and supported(*grads)


def backward(
    wanted: Wanted, grads: list[torch.Tensor], x: torch.Tensor, eps: float, out_dtype: torch.dtype, **saved: Any
) -> Gradients:
    dh, _dx, gradients = _differentiate(wanted["x"], False, wanted, grads[0], None, x, **saved)
    return {**gradients, "x": dh}


def add_forward(residual: torch.Tensor, x: torch.Tensor, **given: Any) -> tuple[torch.Tensor, ...]:
    return _normalize(x, residual, **given)


def serves_add_backward(grads: list[torch.Tensor | None], total: torch.Tensor, **given: Any) -> bool:
    return serves(total, **given) and supported(*grads)


def add_backward(
    wanted: Wanted,
    grads: list[torch.Tensor | None],
    total: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype,
    seed: torch.Tensor | None,
    dropout: float | None,
    **saved: Any,
) -> Gradients:
    dy, dtotal = grads
    if dy is None:
        return residual_add.backward(wanted, None, dtotal, total, seed, dropout)
    needs = wanted["residual"], wanted["x"]
    dresidual, dx, gradients = _differentiate(*needs, wanted, dy, dtotal, total, seed=seed, dropout=dropout, **saved)
    return {**gradients, "residual": dresidual, "x": dx}


op.layer_norm.implementation(
    "triton",
    forward=forward,
    backward=backward,
    serves=serves,
    serves_backward=serves_backward,
    traceable=True,
)
op.add_layer_norm.implementation(
    "triton",
    forward=add_forward,
    backward=add_backward,
    serves=serves,
    serves_backward=serves_add_backward,
    traceable=True,
)
