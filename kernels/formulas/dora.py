"""DoRA, which scales the rows of an adapted weight: a linear layer, the adapter on any base output, and the row norms.

    base = linear(x, W, b)                           every operand in base_dtype
    low  = linear(linear(x, A), B)                   every operand in lora_dtype
    y    = base + (m - 1) * (base - b) + m * s * low           m: one factor for each output feature

PEFT uses m = magnitude / ||W + s B A||, with the norm of each row, through which no gradient flows.  `dora_norm` is
that norm, `dora_linear` is y, and `dora_add` is the last line for a given `base` and, in place of base - b, a given
`plain`: with dropout, for example, the two have different inputs.

With u = x W^T + s low the adapted layer is y = m * u + b, and

    dm = sum over tokens of dy * u       g = dy * m       db = sum dy       dx, dW, dA, dB: those of u, from g

    dora_add:  u = plain + s low       dbase = dy       dplain = dy * (m - 1)       dx, dA, dB: those of s low, from g

u is computed in float32 or wider and y is rounded once, where eager also rounds base, low and base - b.

Saved: u, which only dm reads, in the wider of base's and low's dtypes, where eager saves both; s xa, one row of R per
token; x if A or W is trained.

The norm is computed from a few rows of W + s B A at a time, in float32 or wider, where eager materializes an identity
matrix, B A, s B A and the sum, each at least as large as W.  ||W||^2 + 2 s <W, BA> + s^2 ||BA||^2 would need no such
matrix at all, but cancels if W is close to -s B A.

Shapes: x (..., K), W (N, K), b (N,), A (R, K), B (N, R), m (N,) or (1, N), base, plain and y (..., N).
Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024).
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.library import register_op
from fastlora.kernels.core.numerics import cast, rows, sum_products, sum_rows
from fastlora.kernels.core.semantic_op import Policy
from fastlora.kernels.formulas.lora_linear import base_backward, low_rank_backward, xa_scaling

_SLICE = 1 << 22
"""Elements of W + s B A that are materialized at a time."""


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    return reduce(torch.promote_types, dtypes, torch.float32)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    base_dtype: torch.dtype,
    **adapter: Any,
) -> torch.Tensor:
    """Compute the adapted layer as PEFT does. Return y of shape (..., N) in `out_dtype`."""
    base = F.linear(x.to(base_dtype), weight.to(base_dtype), cast(bias, base_dtype))
    plain = base if bias is None else base - bias
    return add_reference(base, plain, x, **adapter)


def add_reference(
    base: torch.Tensor,
    plain: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: torch.Tensor,
    scaling: float,
    lora_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Add to `base` what PEFT adds. Return y of base's shape in `out_dtype`."""
    m = scale.reshape(-1)
    low = F.linear(F.linear(x.to(lora_dtype), lora_a.to(lora_dtype)), lora_b.to(lora_dtype))
    return (base + ((m - 1) * plain + m * low * scaling)).to(out_dtype)


def _results(
    plain: torch.Tensor,
    rest: torch.Tensor | None,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: torch.Tensor,
    scaling: float,
    lora_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return y = m * u + rest, and the residuals u and s xa."""
    xa = F.linear(x.to(lora_dtype), lora_a.to(lora_dtype))
    low = F.linear(xa, lora_b.to(lora_dtype))
    wide = _wide(plain.dtype, lora_dtype, scale.dtype)
    m, u = scale.reshape(-1).to(wide), torch.add(plain.to(wide), low.to(wide), alpha=scaling)
    y = u * m if rest is None else torch.addcmul(rest.to(wide), u, m)
    saved_u = rows(u).to(torch.promote_types(plain.dtype, lora_dtype))
    return y.to(out_dtype), saved_u, rows(xa) * xa_scaling(scaling, lora_dtype)


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    base_dtype: torch.dtype,
    **adapter: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    plain = F.linear(x.to(base_dtype), weight.to(base_dtype))
    return _results(plain, bias, x, **adapter)


def _scaled(dy: torch.Tensor, scale: torch.Tensor, *dtypes: torch.dtype) -> torch.Tensor:
    """Return dy * m in the widest of `dtypes`."""
    return (dy * scale.reshape(-1)).to(reduce(torch.promote_types, dtypes))


def _scale_gradient(dy: torch.Tensor, u: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return sum_rows(dy * u).to(scale.dtype).reshape(scale.shape)


def backward(
    wanted: Wanted,
    grads: list[torch.Tensor],
    x: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: torch.Tensor,
    u: torch.Tensor | None,
    xa: torch.Tensor,
    x_dtype: torch.dtype,
    scaling: float,
    base_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    **_: Any,
) -> Gradients:
    dy = rows(grads[0]).to(_wide(grads[0].dtype, base_dtype, lora_dtype))
    gradients: Gradients = {}
    if wanted["scale"]:
        assert u is not None
        gradients["scale"] = _scale_gradient(dy, u, scale)
    if bias is not None and wanted["bias"]:
        gradients["bias"] = sum_rows(dy).to(bias.dtype)
    if not any(wanted[name] for name in ("x", "weight", "lora_a", "lora_b")):
        return gradients
    g = _scaled(dy, scale, base_dtype, lora_dtype)
    base, dx = base_backward(wanted, wanted["x"], g, x, weight, None, base_dtype)
    low, dz = low_rank_backward(wanted, wanted["x"], g, x, xa, lora_a, lora_b, None, scaling, lora_dtype)
    if wanted["x"]:
        gradients["x"] = sum_products(dx + dz, x_dtype).reshape(*grads[0].shape[:-1], weight.shape[1])
    return gradients | base | low


dora_linear = register_op(
    "dora_linear",
    family="lora",
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor scale, float scaling, "
        "ScalarType base_dtype, ScalarType lora_dtype, ScalarType out_dtype) -> (Tensor y, Tensor u, Tensor xa)"
    ),
    outputs=1,
    reference=reference,
    forward=forward,
    backward=backward,
    traceable=True,
    saves=("x", "weight", "bias", "lora_a", "lora_b", "scale", "u", "xa"),
    saved_if={
        "x": lambda wanted, _: wanted["weight"] or wanted["lora_a"],
        "u": lambda wanted, _: wanted["scale"],
    },
    policy=Policy(reads_quantized=("weight",)),
)


def add_forward(
    base: torch.Tensor, plain: torch.Tensor, x: torch.Tensor, **adapter: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rest = base.to(_wide(base.dtype, plain.dtype)) - plain
    return _results(plain, rest, x, **adapter)


def add_backward(
    wanted: Wanted,
    grads: list[torch.Tensor],
    x: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: torch.Tensor,
    u: torch.Tensor | None,
    xa: torch.Tensor,
    x_dtype: torch.dtype,
    plain_dtype: torch.dtype,
    scaling: float,
    lora_dtype: torch.dtype,
    **_: Any,
) -> Gradients:
    dy = rows(grads[0]).to(_wide(grads[0].dtype, plain_dtype, lora_dtype))
    gradients: Gradients = {}
    if wanted["scale"]:
        assert u is not None
        gradients["scale"] = _scale_gradient(dy, u, scale)
    if wanted["plain"]:
        gradients["plain"] = (dy * (scale.reshape(-1).to(dy.dtype) - 1)).to(plain_dtype).reshape(grads[0].shape)
    if not any(wanted[name] for name in ("x", "lora_a", "lora_b")):
        return gradients
    g = _scaled(dy, scale, lora_dtype)
    low, dz = low_rank_backward(wanted, wanted["x"], g, x, xa, lora_a, lora_b, None, scaling, lora_dtype)
    if wanted["x"]:
        gradients["x"] = sum_products(dz, x_dtype).reshape(*grads[0].shape[:-1], lora_a.shape[1])
    return gradients | low


dora_add = register_op(
    "dora_add",
    family="lora",
    schema=(
        "(Tensor base, Tensor plain, Tensor x, Tensor lora_a, Tensor lora_b, Tensor scale, float scaling, "
        "ScalarType lora_dtype, ScalarType out_dtype) -> (Tensor y, Tensor u, Tensor xa)"
    ),
    outputs=1,
    reference=add_reference,
    forward=add_forward,
    backward=add_backward,
    traceable=True,
    saves=("plain", "x", "lora_a", "lora_b", "scale", "u", "xa"),
    saved_if={
        "plain": lambda wanted, _: False,
        "x": lambda wanted, _: wanted["lora_a"],
        "u": lambda wanted, _: wanted["scale"],
    },
    passthrough=("base",),
)


def norm_reference(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    lora_dtype: torch.dtype,
    sum_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute ||W + s B A|| of each row as PEFT does, without gradients. Return (N,) in `out_dtype`."""
    eye = torch.eye(lora_a.shape[1], dtype=lora_dtype, device=lora_a.device)
    product = F.linear(F.linear(eye, lora_a.to(lora_dtype)), lora_b.to(lora_dtype)).T
    total = weight.to(sum_dtype) + scaling * product.to(sum_dtype).detach()
    return torch.linalg.norm(total, dim=1).to(out_dtype).detach()


def norm_forward(
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scaling: float,
    lora_dtype: torch.dtype,
    sum_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor]:
    wide = _wide(weight.dtype, lora_a.dtype, lora_b.dtype)
    a, step = lora_a.to(wide), max(1, _SLICE // weight.shape[1])
    norms = [
        torch.linalg.vector_norm(torch.addmm(some.to(wide), b.to(wide), a, alpha=scaling), dim=1)
        for some, b in zip(weight.split(step), lora_b.split(step), strict=True)
    ]
    return (torch.cat(norms).to(out_dtype),)


dora_norm = register_op(
    "dora_norm",
    family="lora",
    schema=(
        "(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling, ScalarType lora_dtype, ScalarType sum_dtype, "
        "ScalarType out_dtype) -> (Tensor norm)"
    ),
    outputs=1,
    reference=norm_reference,
    forward=norm_forward,
    traceable=True,
    saves=(),
)
