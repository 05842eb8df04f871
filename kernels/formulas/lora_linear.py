"""A linear layer with LoRA, as PEFT computes it, and the adapter alone.

    base = linear(x, W, b)                           every operand in base_dtype
    xa   = z A^T        low = linear(xa, B, c)       every operand in lora_dtype; z is x, or x after dropout
    y    = (base + low * s).to(out_dtype)            the sum in the widest of the three dtypes

so the roundings are eager's, in eager's order: float32 adapters on a bfloat16 base compute in float32; under autocast
everything is bfloat16, except for a float32 sum if the base layer's output is cast for a float32 residual stream.
`lora_add` is the last line for a given `base`.

Backward, with the low-rank path factored through dxa, which is only R wide:

    dW = dy^T x         db = sum dy          dx = dy W
    dB = dy^T (s xa)    dc = s sum dy        dxa = s dy B        dA = dxa^T z        dz = dxa A

s is applied to tensors that are only R wide, so dy * s, as large as y, is never materialized.  Without dropout z is x
and dx = dy W + dxa A, where the second product is added onto the first if their dtypes agree.

There are two kinds of dropout.  A given z, `x_dropped`, has a gradient of its own.  With a `seed` and a probability,
`dropout`, z is x * m with the mask m of `dropout.py`, which is not saved: the backward recomputes z for dA, and
dx = dy W + (dxa A) * m is masked and summed in one pass.

Saved: s xa, one row of R per token, for dB; z only if A is trained, x only if W is trained or z is computed from x and
A is trained.  A frozen base with dropout, or an adapter with a frozen A, saves no activation but s xa.  In float16 a
scaling above 1 is applied to B and dB instead, since s xa may overflow where xa and y do not.

Shapes: x and z (..., K), W (N, K), b and c (N,), A (R, K), B (N, R), y (..., N), xa (T, R) for T tokens.
Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastlora.kernels.core.cost import Cost, Work
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.library import register_op
from fastlora.kernels.core.numerics import Addend, cast, rows, scaled_product, sum_products, sum_rows
from fastlora.kernels.core.semantic_op import Policy
from fastlora.kernels.formulas import dropout as masks
from fastlora.kernels.formulas.dropout import dropped_out

PARAMETERS = ("weight", "bias", "lora_a", "lora_b", "lora_bias")
"""The tensors of one adapted layer, W, b, A, B and c above, in the schemas' order."""


def reference(
    x: torch.Tensor,
    x_dropped: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    lora_bias: torch.Tensor | None,
    scaling: float,
    base_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    out_dtype: torch.dtype,
    seed: torch.Tensor | None = None,
    dropout: float | None = None,
) -> torch.Tensor:
    """Compute the adapted layer as PEFT does. Return y of shape (..., N) in `out_dtype`."""
    masks.check_argument(seed, dropout, x_dropped)
    base = F.linear(x.to(base_dtype), weight.to(base_dtype), cast(bias, base_dtype))
    z = x if x_dropped is None else x_dropped
    return add_reference(base, z, lora_a, lora_b, lora_bias, scaling, lora_dtype, out_dtype, seed, dropout)


def add_reference(
    base: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    lora_bias: torch.Tensor | None,
    scaling: float,
    lora_dtype: torch.dtype,
    out_dtype: torch.dtype,
    seed: torch.Tensor | None = None,
    dropout: float | None = None,
) -> torch.Tensor:
    """Add the adapter's output to `base`. Return y of base's shape in `out_dtype`."""
    masks.check_argument(seed, dropout)
    if seed is not None and dropout is not None:
        x = masks.reference(x, None, seed, dropout, lora_dtype)
    xa = F.linear(x.to(lora_dtype), lora_a.to(lora_dtype))
    low = F.linear(xa, lora_b.to(lora_dtype), cast(lora_bias, lora_dtype))
    return _sum(base, low * scaling, out_dtype)


def _sum(base: torch.Tensor, low: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return base + low, rounded to `dtype` once."""
    wide = torch.promote_types(torch.promote_types(base.dtype, low.dtype), dtype)
    return (base.to(wide) + low).to(dtype)


def xa_scaling(scaling: float, dtype: torch.dtype) -> float:
    """Return the part of the scaling that is applied to the saved xa, for adapters of this dtype."""
    return 1.0 if dtype is torch.float16 and abs(scaling) > 1 else scaling


def b_scaling(scaling: float, dtype: torch.dtype) -> float:
    """Return the part of the scaling that is applied to B and dB: what `xa_scaling` leaves."""
    return scaling if xa_scaling(scaling, dtype) != scaling else 1.0


def add_forward(
    base: torch.Tensor,
    x: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    lora_bias: torch.Tensor | None,
    scaling: float,
    lora_dtype: torch.dtype,
    out_dtype: torch.dtype,
    seed: torch.Tensor | None = None,
    dropout: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    masks.check_argument(seed, dropout)
    xa = F.linear(dropped_out(x, seed, dropout, lora_dtype), lora_a.to(lora_dtype))
    low = F.linear(xa, lora_b.to(lora_dtype), cast(lora_bias, lora_dtype))
    return _sum(base, low * scaling, out_dtype), rows(xa) * xa_scaling(scaling, lora_dtype)


def forward(
    x: torch.Tensor,
    x_dropped: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    base_dtype: torch.dtype,
    **adapter: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    masks.check_argument(adapter.get("seed"), adapter.get("dropout"), x_dropped)
    base = F.linear(x.to(base_dtype), weight.to(base_dtype), cast(bias, base_dtype))
    return add_forward(base, x if x_dropped is None else x_dropped, **adapter)


def base_backward(
    wanted: Wanted,
    needs_x: bool,
    dy: torch.Tensor,
    x: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    base_dtype: torch.dtype,
) -> tuple[Gradients, list[Addend]]:
    """Return the gradients of W and b, and a list with the addend of dx, empty unless `needs_x`, from dy (T, N)."""
    dy = dy.to(base_dtype)
    gradients: Gradients = {}
    if wanted["weight"]:
        assert x is not None
        gradients["weight"] = (dy.t() @ rows(x).to(base_dtype)).to(weight.dtype)
    if bias is not None and wanted["bias"]:
        gradients["bias"] = sum_rows(dy).to(bias.dtype)
    return gradients, [(dy, weight.to(base_dtype))] if needs_x else []


def low_rank_backward(
    wanted: Wanted,
    needs_z: bool,
    dy: torch.Tensor,
    z: torch.Tensor | None,
    xa: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    lora_bias: torch.Tensor | None,
    scaling: float,
    lora_dtype: torch.dtype,
) -> tuple[Gradients, list[Addend]]:
    """Return the gradients of A, B and c, and a list with the addend of dz, empty unless `needs_z`.

    dy is (T, N), and xa the saved residual (T, R).
    """
    dy = dy.to(lora_dtype)
    gradients: Gradients = {}
    if wanted["lora_b"]:
        gradients["lora_b"] = scaled_product(dy.t(), xa, b_scaling(scaling, lora_dtype)).to(lora_b.dtype)
    if lora_bias is not None and wanted["lora_bias"]:
        gradients["lora_bias"] = (sum_rows(dy) * scaling).to(lora_bias.dtype)
    if not (wanted["lora_a"] or needs_z):
        return gradients, []
    dxa = scaled_product(dy, lora_b.to(lora_dtype), scaling)
    if wanted["lora_a"]:
        assert z is not None
        gradients["lora_a"] = (dxa.t() @ rows(z).to(lora_dtype)).to(lora_a.dtype)
    return gradients, [(dxa, lora_a.to(lora_dtype))] if needs_z else []


def parts_backward(
    wanted: Wanted,
    needs_x: bool,
    dy: torch.Tensor,
    x: torch.Tensor | None,
    z: torch.Tensor | None,
    xa: torch.Tensor,
    base_dtype: torch.dtype,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    **adapter: Any,
) -> tuple[Gradients, list[Addend], list[Addend]]:
    """Return the gradients of an adapted layer's `PARAMETERS`, and the addends of dx and of dz, empty unless
    `needs_x`."""
    dy = rows(dy)
    gradients, dx = base_backward(wanted, needs_x, dy, x, weight, bias, base_dtype)
    low_gradients, dz = low_rank_backward(wanted, needs_x, dy, z, xa, **adapter)
    return gradients | low_gradients, dx, dz


def projection_backward(
    wanted: Wanted, needs_x: bool, dy: torch.Tensor, x: torch.Tensor | None, xa: torch.Tensor, **layer: Any
) -> tuple[Gradients, list[Addend]]:
    """Do what `parts_backward` does if z is x; return the gradients of parameters, and all addends of dx."""
    gradients, dx, dz = parts_backward(wanted, needs_x, dy, x, x, xa, **layer)
    return gradients, dx + dz


def backward(
    wanted: Wanted,
    grads: list[torch.Tensor],
    x: torch.Tensor | None,
    x_dropped: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    xa: torch.Tensor,
    x_dtype: torch.dtype,
    x_dropped_dtype: torch.dtype | None,
    base_dtype: torch.dtype,
    out_dtype: torch.dtype,
    seed: torch.Tensor | None = None,
    dropout: float | None = None,
    **adapter: Any,
) -> Gradients:
    dy = rows(grads[0])
    shape = (*grads[0].shape[:-1], weight.shape[1])
    has_dropped = x_dropped_dtype is not None
    z = x_dropped if has_dropped else x
    if z is not None and wanted["lora_a"]:
        z = dropped_out(z, seed, dropout, adapter["lora_dtype"])
    gradients, dx = base_backward(wanted, wanted["x"], dy, x, weight, bias, base_dtype)
    low_gradients, dz = low_rank_backward(wanted, wanted["x_dropped" if has_dropped else "x"], dy, z, xa, **adapter)
    gradients |= low_gradients
    if wanted["x"] and seed is not None:
        base, low = (left @ right for left, right in (*dx, *dz))
        gradients["x"] = dropped_out(low, seed, dropout, x_dtype, base).reshape(shape)
    elif wanted["x"]:
        gradients["x"] = sum_products(dx if has_dropped else dx + dz, x_dtype).reshape(shape)
    if x_dropped_dtype is not None and wanted["x_dropped"]:
        gradients["x_dropped"] = sum_products(dz, x_dropped_dtype).reshape(shape)
    return gradients


lora_linear = register_op(
    "lora_linear",
    family="lora",
    schema=(
        "(Tensor x, Tensor? x_dropped, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, Tensor? lora_bias, "
        "float scaling, ScalarType base_dtype, ScalarType lora_dtype, ScalarType out_dtype, "
        "Tensor? seed, float? dropout) -> (Tensor y, Tensor xa)"
    ),
    outputs=1,
    reference=reference,
    forward=forward,
    backward=backward,
    traceable=True,
    saves=("x", "x_dropped", *PARAMETERS, "xa", "seed"),
    saved_if={
        "x": lambda wanted, given: wanted["weight"] or (wanted["lora_a"] and given["x_dropped"] is None),
        "x_dropped": lambda wanted, _: wanted["lora_a"],
    },
    policy=Policy(reads_quantized=("weight",), outputs_mutable=True),
    cost=Cost(
        forward=Work(flops="2*T*N*K + 2*T*R*(N + K)", bytes="(T*K + T*N + T*R)*b + N*K*w + R*(N + K)*p"),
        backward=Work(flops="2*T*N*K + 4*T*R*(N + K)", bytes="(2*T*K + T*N + T*R)*b + N*K*w + 2*R*(N + K)*p"),
    ),
)


def add_backward(
    wanted: Wanted,
    grads: list[torch.Tensor],
    x: torch.Tensor | None,
    lora_a: torch.Tensor,
    x_dtype: torch.dtype,
    out_dtype: torch.dtype,
    seed: torch.Tensor | None = None,
    dropout: float | None = None,
    **adapter: Any,
) -> Gradients:
    z = None if x is None else dropped_out(x, seed, dropout, adapter["lora_dtype"])
    gradients, dz = low_rank_backward(wanted, wanted["x"], rows(grads[0]), z, lora_a=lora_a, **adapter)
    if wanted["x"]:
        ((left, right),) = dz
        dx = dropped_out(left @ right, seed, dropout, x_dtype)
        gradients["x"] = dx.reshape(*grads[0].shape[:-1], lora_a.shape[1])
    return gradients


lora_add = register_op(
    "lora_add",
    family="lora",
    schema=(
        "(Tensor base, Tensor x, Tensor lora_a, Tensor lora_b, Tensor? lora_bias, float scaling, "
        "ScalarType lora_dtype, ScalarType out_dtype, Tensor? seed, float? dropout) -> (Tensor y, Tensor xa)"
    ),
    outputs=1,
    reference=add_reference,
    forward=add_forward,
    backward=add_backward,
    traceable=True,
    saves=("x", "lora_a", "lora_b", "lora_bias", "xa", "seed"),
    saved_if={"x": lambda wanted, _: wanted["lora_a"]},
    passthrough=("base",),
    policy=Policy(outputs_mutable=True),
    cost=Cost(
        forward=Work(flops="2*T*R*(N + K)", bytes="(T*K + 2*T*N + T*R)*b + R*(N + K)*p"),
        backward=Work(flops="4*T*R*(N + K)", bytes="(2*T*K + T*N + T*R)*b + 2*R*(N + K)*p"),
    ),
)
