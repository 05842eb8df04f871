"""RMSNorm, alone and with the preceding residual addition.

    h = x.to(compute)                     for add_rms_norm, x is the sum residual + x, rounded to its own dtype; see
                                          `residual_add.py`, also for dropout of x before the addition
    r = rsqrt(mean(h^2) + eps)            over the last dimension, one number per row
    n = (h * r).to(norm_dtype)            models differ in whether they multiply by w before or after this rounding
    y = (n * (offset + w)).to(out_dtype)  offset is 0, or 1 for models that store the weight minus 1

Backward, with g = dy * (offset + w):

    dh = r * (g - n * mean(g * n))        dw = sum over rows of dy * n

because dr/dh = -r^3 h / H.  Saved: x and r (one number per row).  n is recomputed, which costs one multiplication and
saves a tensor of x's size.  For the sum, the gradient of residual is dh plus the gradient of the sum itself, and that
of x the same times the dropout mask, if any.

Shapes: x (..., H), weight (H,) or None, seed one int64; y and dx have the strides of x, or of the sum.
Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.kernels.core.cost import Cost, Work
from fastlora.kernels.core.gradients import Gradients
from fastlora.kernels.core.implementations import with_strides_of
from fastlora.kernels.core.library import register_op
from fastlora.kernels.core.semantic_op import Policy
from fastlora.kernels.formulas import residual_add

_ATTRIBUTES = (
    "Tensor? weight, float eps, float offset, "
    "ScalarType compute_dtype, ScalarType norm_dtype, ScalarType scale_dtype, ScalarType out_dtype"
)


def _scale(weight: torch.Tensor, offset: float, scale_dtype: torch.dtype) -> torch.Tensor:
    weight = weight.to(scale_dtype)
    return weight + offset if offset else weight


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    offset: float,
    compute_dtype: torch.dtype,
    norm_dtype: torch.dtype,
    scale_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute RMSNorm as models do.

    Return y of x's shape in `out_dtype`, and the residual rstd, of shape (..., 1) in `compute_dtype`.
    """
    h = x.to(compute_dtype)
    rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    n = (h * rstd).to(norm_dtype)
    y = n if weight is None else n * _scale(weight, offset, scale_dtype)
    return y.to(out_dtype), rstd


def reference(x: torch.Tensor, weight: torch.Tensor | None, **attributes: Any) -> torch.Tensor:
    """Return y only."""
    return forward(x, weight, **attributes)[0]


def _backward(
    needs_dh: bool,
    needs_dw: bool,
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    scale_dtype: torch.dtype,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of h and of the weight, computed in rstd's dtype."""
    compute = rstd.dtype
    n = x.to(compute) * rstd
    g = dy.to(compute)
    dw = (g * n).reshape(-1, n.shape[-1]).sum(0).to(weight.dtype) if weight is not None and needs_dw else None
    if not needs_dh:
        return None, dw
    if weight is not None:
        g = g * _scale(weight, offset, scale_dtype).to(compute)
    return rstd * (g - n * (g * n).mean(-1, keepdim=True)), dw


def backward(
    wanted: dict[str, bool],
    grads: list[torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    offset: float,
    scale_dtype: torch.dtype,
    **_: Any,
) -> Gradients:
    dx, dw = _backward(wanted["x"], wanted["weight"], grads[0], x, weight, rstd, offset, scale_dtype)
    return {"x": dx if dx is None else with_strides_of(dx.to(x.dtype), x), "weight": dw}


rms_norm = register_op(
    "rms_norm",
    family="norm",
    schema=f"(Tensor x, {_ATTRIBUTES}) -> (Tensor y, Tensor rstd)",
    outputs=1,
    reference=reference,
    forward=forward,
    backward=backward,
    traceable=True,
    saves=("x", "weight", "rstd"),
    policy=Policy(recompute_from=(None, {})),
    cost=Cost(
        forward=Work(flops="4*T*H", bytes="2*T*H*b + H*w + 4*T"),
        backward=Work(flops="7*T*H", bytes="3*T*H*b + H*w + 4*T"),
    ),
)


def add_reference(
    residual: torch.Tensor,
    x: torch.Tensor,
    seed: torch.Tensor | None = None,
    dropout: float | None = None,
    **attributes: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm of the sum, and the sum, which is the new residual stream.

    Raises:
        ValueError: if only one of `seed` and `dropout` is given, or they are invalid.
    """
    total = residual_add.reference(residual, x, seed, dropout)
    return reference(total, **attributes), total


def add_forward(
    residual: torch.Tensor, x: torch.Tensor, seed: torch.Tensor | None, dropout: float | None, **attributes: Any
) -> tuple[torch.Tensor, ...]:
    total = residual_add.forward(residual, x, seed, dropout)
    y, rstd = forward(total, **attributes)
    return y, total, rstd


def add_backward(
    wanted: dict[str, bool],
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
    needs = wanted["residual"] or wanted["x"], wanted["weight"]
    dh, dw = _backward(*needs, dy, total, weight, rstd, offset, scale_dtype)
    return {"weight": dw} | residual_add.backward(wanted, dh, dtotal, total, seed, dropout)


add_rms_norm = register_op(
    "add_rms_norm",
    family="norm",
    schema=(
        f"(Tensor residual, Tensor x, {_ATTRIBUTES}, Tensor? seed, float? dropout) "
        "-> (Tensor y, Tensor total, Tensor rstd)"
    ),
    outputs=2,
    reference=add_reference,
    forward=add_forward,
    backward=add_backward,
    traceable=True,
    saves=("total", "weight", "rstd", "seed"),
    policy=Policy(recompute_from=(rms_norm, {"x": "total"})),
    tied=("residual", "x"),
    untied_by="seed",
    read_by={"weight": 0},
    cost=Cost(
        forward=Work(flops="(5 + 2*S)*T*H", bytes="4*T*H*b + H*w + 4*T"),
        backward=Work(flops="(8 + 2*S)*T*H", bytes="(4 + S)*T*H*b + H*w + 4*T"),
    ),
)
