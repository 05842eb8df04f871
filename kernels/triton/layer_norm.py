"""LayerNorm, alone and after the residual addition: `kernels/formulas/layer_norm.py` has the formulas.

A program holds whole rows, in float32: the mean is known before the squares are summed, and each element is loaded once
and stored once. The backward is organised as RMSNorm's: a program per few rows where only x wants its gradient; where
the parameters do, programs that walk over the rows and sum their shares of dw and db, which are then added up in a
fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import supported
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.implementations import laid_out
from fastlora.kernels.formulas import layer_norm as op
from fastlora.kernels.formulas import residual_add
from fastlora.kernels.triton.blocks import row_reduce as over
from fastlora.kernels.triton.dropout import drawing, row_factors
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import TL_DTYPES, Rows, vector


@precompile.kernel(do_not_specialize=["T", "eps", "threshold", "scale"])
def forward_kernel(
    x_ptr, residual_ptr, w_ptr, b_ptr, y_ptr, total_ptr, mean_ptr, rstd_ptr,
    T, H, x_stride, residual_stride, y_stride, eps, seed_ptr, threshold, scale, FOURS: tl.constexpr,
    ADD: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr,
    READ: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """total = residual + x (* m); y = (total - mean) * rsqrt(mean((total - mean)^2) + eps) * w + b: BLOCK_T rows."""
    row = tl.arange(0, BLOCK_T)[:, None].to(tl.int64) + tl.program_id(0) * BLOCK_T
    cols = tl.arange(0, BLOCK_H)[None, :]
    in_row = cols < H
    mask = (row < T) & in_row
    h = over.read(x_ptr + row * x_stride + cols, mask, READ)
    if WEIGHT:  # on their way while the row is summed
        w = tl.load(w_ptr + cols, mask=in_row, other=0.0)
    if BIAS:
        b = tl.load(b_ptr + cols, mask=in_row, other=0.0)
    if ADD:
        residual = over.read(residual_ptr + row * residual_stride + cols, mask, READ)
        if seed_ptr is not None:
            h *= row_factors(row, H, seed_ptr, threshold, scale, FOURS, BLOCK_T, BLOCK_H)
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
    T, H, dy_stride, h_stride, dtotal_stride, seed_ptr, threshold, scale, FOURS: tl.constexpr,
    DTOTAL: tl.constexpr, DH: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr,
    READ: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Stores dh and dx of BLOCK_T rows; returns their dy * n, if that is wanted, and their dy."""
    row = tl.arange(0, BLOCK_T)[:, None].to(tl.int64) + tile * BLOCK_T
    mask = (row < T) & (cols < H)
    dy = over.read(dy_ptr + row * dy_stride + cols, mask, READ)
    n = dy
    if DH or DX or DW:
        mean = tl.load(mean_ptr + row, mask=row < T, other=0.0)
        rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)
        h = over.read(h_ptr + row * h_stride + cols, mask, READ)
        if (DH or DX) and DTOTAL:  # on its way while the row is summed
            through = over.read(dtotal_ptr + row * dtotal_stride + cols, mask, READ)
        n = tl.where(mask, (h - mean) * rstd, 0.0)
    if DH or DX:
        g = dy * weight
        shift = tl.sum(g, axis=1, keep_dims=True) / H
        dh = rstd * (g - shift - n * (tl.sum(g * n, axis=1, keep_dims=True) / H))
        if DTOTAL:
            dh += through
        if DH:
            tl.store(dh_ptr + row * H + cols, dh.to(dh_ptr.dtype.element_ty), mask=mask)
        if DX:
            dx = dh * row_factors(row, H, seed_ptr, threshold, scale, FOURS, BLOCK_T, BLOCK_H)
            tl.store(dx_ptr + row * H + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    return dy * n, dy


@precompile.kernel(do_not_specialize=["T", "threshold", "scale"])
def backward_kernel(
    dy_ptr, h_ptr, w_ptr, mean_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr, dw_ptr, db_ptr,
    T, H, dy_stride, h_stride, dtotal_stride, seed_ptr, threshold, scale, FOURS: tl.constexpr,
    WEIGHT: tl.constexpr, DTOTAL: tl.constexpr, DH: tl.constexpr, DX: tl.constexpr, DW: tl.constexpr, DB: tl.constexpr,
    READ: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """dh = rstd * (g - mean(g) - n * mean(g * n)) + dtotal, and dx = dh * m, for BLOCK_T rows; if DW or DB for every
    num_programs-th BLOCK_T of them, and the sums of their dy * n and dy."""
    cols = tl.arange(0, BLOCK_H)[None, :]
    weight = tl.full((1, BLOCK_H), 1.0, tl.float32)
    if WEIGHT:
        weight = tl.load(w_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)
    if DW or DB:
        dw = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        db = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
        for tile in range(tl.program_id(0), tl.cdiv(T, BLOCK_T), tl.num_programs(0)):
            more_dw, more_db = _backward_rows(
                tile, weight, cols, dy_ptr, h_ptr, mean_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr,
                T, H, dy_stride, h_stride, dtotal_stride, seed_ptr, threshold, scale, FOURS,
                DTOTAL, DH, DX, DW, READ, BLOCK_T, BLOCK_H,
            )  # fmt: skip
            if DW:
                dw += more_dw
            if DB:
                db += more_db
        share = tl.program_id(0).to(tl.int64) * H + cols
        if DW:
            tl.store(dw_ptr + share, tl.sum(dw, axis=0, keep_dims=True), mask=cols < H)
        if DB:
            tl.store(db_ptr + share, tl.sum(db, axis=0, keep_dims=True), mask=cols < H)
    else:
        _backward_rows(
            tl.program_id(0), weight, cols, dy_ptr, h_ptr, mean_ptr, rstd_ptr, dtotal_ptr, dh_ptr, dx_ptr,
            T, H, dy_stride, h_stride, dtotal_stride, seed_ptr, threshold, scale, FOURS,
            DTOTAL, DH, DX, DW, READ, BLOCK_T, BLOCK_H,
        )  # fmt: skip


def _normalise(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    seed: torch.Tensor | None = None,
    dropout: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, the sum (x if there is no residual), mean and rstd."""
    if residual is not None:
        x = over.as_summed(x, residual)
    rows, H = Rows(x, numbered=seed is not None), x.shape[-1]
    matrix = rows.of(x)
    added = matrix if residual is None else rows.of(residual)
    y, mean, rstd = rows.empty(H, out_dtype), rows.empty(1, torch.float32), rows.empty(1, torch.float32)
    total = x if residual is None else rows.empty(H, torch.promote_types(x.dtype, residual.dtype))
    programs, plan = over.plan(rows.count, H, x.device, rounding=seed is not None)
    forward_kernel[(programs,)](
        matrix, added, vector(weight), vector(bias), y, total, mean, rstd,
        rows.count, H, matrix.stride(0), added.stride(0), H, eps, *drawing(x, seed, dropout),
        ADD=residual is not None, WEIGHT=weight is not None, BIAS=bias is not None, **plan,
    )  # fmt: skip
    total = total if residual is None else laid_out(total, x)
    return y.contiguous(), total, mean.contiguous(), rstd.contiguous()


def _differentiate(
    wants_dh: bool,
    wants_dx: bool,
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
    """The gradient of h, what was normed (for a sum, with the sum's own added), the same dropped out, and those of
    weight and bias."""
    rows, H = Rows(h, numbered=seed is not None), h.shape[-1]
    matrix, incoming = rows.of(h), rows.of(dy)
    through = incoming if dtotal is None else rows.of(dtotal)
    walking = (weight is not None and wanted["weight"]) or (bias is not None and wanted["bias"])
    programs, plan = over.plan(rows.count, H, h.device, walking)
    dh, dx = (rows.empty(H, h.dtype) if wants else None for wants in (wants_dh, wants_dx))
    dw, db = over.shares(programs, wanted["weight"], weight), over.shares(programs, wanted["bias"], bias)
    backward_kernel[(programs,)](
        incoming, matrix, vector(weight), rows.of(mean), rows.of(rstd), through, dh, dx, dw, db,
        rows.count, H, incoming.stride(0), matrix.stride(0), through.stride(0), *drawing(h, seed, dropout),
        WEIGHT=weight is not None, DTOTAL=dtotal is not None, DH=wants_dh, DX=wants_dx,
        DW=dw is not None, DB=db is not None, **plan,
    )  # fmt: skip
    dh, dx = (None if gradient is None else laid_out(gradient, h) for gradient in (dh, dx))
    return dh, dx, {"weight": over.total(dw, weight), "bias": over.total(db, bias)}


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
        and x.shape[-1] <= over.WIDEST
        and (residual is None or residual.shape == x.shape)
        and supported(x, weight, bias, residual)
    )


def forward(x: torch.Tensor, **given: Any) -> tuple[torch.Tensor, ...]:
    y, _, mean, rstd = _normalise(x, None, **given)
    return y, mean, rstd


def serves_backward(grads: list[torch.Tensor], x: torch.Tensor, **given: Any) -> bool:
    return serves(x, **given) and supported(*grads)


def backward(
    wanted: Wanted, grads: list[torch.Tensor], x: torch.Tensor, eps: float, out_dtype: torch.dtype, **saved: Any
) -> Gradients:
    dh, _dx, gradients = _differentiate(wanted["x"], False, wanted, grads[0], None, x, **saved)
    return {**gradients, "x": dh}


def add_forward(residual: torch.Tensor, x: torch.Tensor, **given: Any) -> tuple[torch.Tensor, ...]:
    return _normalise(x, residual, **given)


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
    wants = wanted["residual"], wanted["x"]
    dresidual, dx, gradients = _differentiate(*wants, wanted, dy, dtotal, total, seed=seed, dropout=dropout, **saved)
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
