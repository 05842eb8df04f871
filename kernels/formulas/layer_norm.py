"""LayerNorm, alone and with the preceding residual addition.

    h = x.to(compute)                     for add_layer_norm, x is the sum residual + x, rounded to its own dtype; see
                                          `residual_add.py`, also for dropout of x before the addition
    m = mean(h)                           over the last dimension, one number per row
    r = rsqrt(mean((h - m)^2) + eps)      the same
    n = (h - m) * r
    y = (n * w + b).to(out_dtype)

Backward, with g = dy * w:

    dh = r * (g - mean(g) - n * mean(g * n))        dw = sum over rows of dy * n        db = sum over rows of dy

because dn = r * (dh - mean(dh) - n * mean(n * dh)) is a symmetric map: the projection orthogonal to the constants and
to n, since shifting and scaling a row leave n unchanged.  Saved: x, m and r (two numbers per row).  n is recomputed,
which costs a subtraction and a multiplication and saves a tensor of x's size.  For the sum, the gradient of residual is
dh plus the gradient of the sum itself, and that of x the same times the dropout mask, if any.

Shapes: x (..., H), weight and bias (H,) or None, seed one int64; y is contiguous, as in torch's own layer_norm, and dx
has the strides of x, or of the sum.
`compute` is x's dtype, or float32 if that is narrower: half precision is rounded once, at the end.
Source: Ba, Kiros and Hinton, "Layer Normalization" (2016).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastlora.kernels.core.cost import Cost, Work
from fastlora.kernels.core.gradients import Gradients
from fastlora.kernels.core.implementations import contiguous, with_strides_of
from fastlora.kernels.core.library import register_op
from fastlora.kernels.core.semantic_op import Policy
from fastlora.kernels.formulas import residual_add

_ATTRIBUTES = "Tensor? weight, Tensor? bias, float eps, ScalarType out_dtype"


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def reference(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, out_dtype: torch.dtype
) -> torch.Tensor:
    """Compute LayerNorm over the last dimension. Return y of x's shape in `out_dtype`."""
    compute = _compute_dtype(x)
    weight, bias = (t if t is None else t.to(compute) for t in (weight, bias))
    return F.layer_norm(x.to(compute), x.shape[-1:], weight, bias, eps).to(out_dtype)


def forward(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y and the residuals mean and rstd, of shape (..., 1) in the compute dtype."""
    h = contiguous(x.to(_compute_dtype(x)))
    mean = h.mean(-1, keepdim=True)
    centered = h - mean  # before squaring: mean(h^2) - m^2 would cancel
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    y = centered * rstd
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    return y.to(out_dtype), mean, rstd


def _backward(
    needs_dh: bool,
    wanted: dict[str, bool],
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor | None, Gradients]:
    """Return the gradient of h, in the compute dtype, and those of weight and bias."""
    n = (x.to(rstd.dtype) - mean) * rstd
    g = dy.to(rstd.dtype)
    gradients: Gradients = {}
    if weight is not None and wanted["weight"]:
        gradients["weight"] = _sum_rows(g * n).to(weight.dtype)
    if bias is not None and wanted["bias"]:
        gradients["bias"] = _sum_rows(g).to(bias.dtype)
    if not needs_dh:
        return None, gradients
    if weight is not None:
        g = g * weight
    dh = rstd * (g - g.mean(-1, keepdim=True) - n * (g * n).mean(-1, keepdim=True))
    return dh, gradients


def _sum_rows(t: torch.Tensor) -> torch.Tensor:
    return t.reshape(-1, t.shape[-1]).sum(0)


def backward(
    wanted: dict[str, bool],
    grads: list[torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    **_: Any,
) -> Gradients:
    dh, gradients = _backward(wanted["x"], wanted, grads[0], x, weight, bias, mean, rstd)
    return {**gradients, "x": dh if dh is None else with_strides_of(dh.to(x.dtype), x)}


layer_norm = register_op(
    "layer_norm",
    family="norm",
    schema=f"(Tensor x, {_ATTRIBUTES}) -> (Tensor y, Tensor mean, Tensor rstd)",
    outputs=1,
    reference=reference,
    forward=forward,
    backward=backward,
    traceable=True,
    saves=("x", "weight", "bias", "mean", "rstd"),
    policy=Policy(recompute_from=(None, {})),
    cost=Cost(
        forward=Work(flops="7*T*H", bytes="2*T*H*b + 2*H*w + 8*T"),
        backward=Work(flops="9*T*H", bytes="3*T*H*b + H*w + 8*T"),
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
    y, mean, rstd = forward(total, **attributes)
    return y, total, mean, rstd


def add_backward(
    wanted: dict[str, bool],
    grads: list[torch.Tensor | None],
    total: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    seed: torch.Tensor | None,
    dropout: float | None,
    **_: Any,
) -> Gradients:
    dy, dtotal = grads
    if dy is None:
        return residual_add.backward(wanted, None, dtotal, total, seed, dropout)
    dh, gradients = _backward(wanted["residual"] or wanted["x"], wanted, dy, total, weight, bias, mean, rstd)
    return gradients | residual_add.backward(wanted, dh, dtotal, total, seed, dropout)


add_layer_norm = register_op(
    "add_layer_norm",
    family="norm",
    schema=(
        f"(Tensor residual, Tensor x, {_ATTRIBUTES}, Tensor? seed, float? dropout) "
        "-> (Tensor y, Tensor total, Tensor mean, Tensor rstd)"
    ),
    outputs=2,
    reference=add_reference,
    forward=add_forward,
    backward=add_backward,
    traceable=True,
    saves=("total", "weight", "bias", "mean", "rstd", "seed"),
    policy=Policy(recompute_from=(layer_norm, {"x": "total"})),
    tied=("residual", "x"),
    untied_by="seed",
    read_by={"weight": 0, "bias": 0},
    cost=Cost(
        forward=Work(flops="(8 + 2*S)*T*H", bytes="4*T*H*b + 2*H*w + 8*T"),
        backward=Work(flops="(10 + 2*S)*T*H", bytes="(4 + S)*T*H*b + H*w + 8*T"),
    ),
)
