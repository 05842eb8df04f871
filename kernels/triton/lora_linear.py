"""A LoRA linear layer, and the adapter alone: `kernels/formulas/lora_linear.py` has the formulas.

Large products are sums (`matmul.py`), in which the low-rank term costs neither a pass over the output nor a rounding;
where cuBLAS is faster, the low-rank term is added onto its result. Thin products (`low_rank.py`) take one pass over
their activation each; dxa and dB share one.

Adapters are rounded to the compute dtype where they are used: in the kernels, or once if they are large. A dropped-out
input is recomputed where it is needed, and its gradient is masked in the pass that adds it to the base layer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastlora.kernels.core.devices import FLOAT_DTYPES, HALF_DTYPES, computes, supported
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.implementations import with_strides_of
from fastlora.kernels.core.numerics import Addend, rows, sum_rows
from fastlora.kernels.core.quantized_weight import QuantizedWeight
from fastlora.kernels.formulas import dropout as masks
from fastlora.kernels.formulas import lora_linear as op
from fastlora.kernels.triton import dropout as mask
from fastlora.kernels.triton.blocks import gemv_4bit, low_rank, matmul


def sum_products(
    low: Addend | None, products: Sequence[Addend], bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Return low_left @ low_right + sum of left @ right (+ bias), rounded to `dtype`, for at least one of `products`.

    `matmul.py` computes it if there is a low-rank addend and its kernel is faster; otherwise cuBLAS does.
    """
    lows = [] if low is None else [low]
    if lows and matmul.serves([*lows, *products], bias) is True:
        return matmul.sum_of_products([*lows, *products], bias, dtype=dtype)
    left, right = products[0]
    if dtype is torch.float32 and left.dtype in HALF_DTYPES:
        return _sum_products_float32([*products, *lows], bias)
    out = torch.mm(left, right) if bias is None else torch.addmm(bias.to(left.dtype), left, right)
    for left, right in [*products[1:], *lows]:
        out.addmm_(left, right)
    return out.to(dtype)


def _sum_products_float32(products: Sequence[Addend], bias: torch.Tensor | None) -> torch.Tensor:
    """Return the sum of products of 16-bit operands (+ bias) in float32."""
    (left, right), *others = products
    out = low_rank.mm_float32(left, right)
    for left, right in others:
        out = addmm_float32(out, left, right)
    return out if bias is None else out.add_(bias)


def addmm_float32(t: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    """Return t + scaling * left @ right in float32, for 16-bit operands, without casting them on a GPU."""
    if left.is_cuda:
        return torch.addmm(t, left, right, out_dtype=torch.float32, alpha=scaling)
    return t + low_rank.mm_float32(left, right) * scaling


def total_bias(
    bias: torch.Tensor | None, lora_bias: torch.Tensor | None, scaling: float, dtype: torch.dtype
) -> torch.Tensor | None:
    """Return b + s c; in float32 if there is a c."""
    if lora_bias is None:
        return bias
    added = lora_bias.to(dtype).float() * scaling
    return added if bias is None else added + bias.to(dtype).float()


def project(
    x: torch.Tensor,
    xa: torch.Tensor,
    weight: torch.Tensor | QuantizedWeight,
    bias: torch.Tensor | None,
    lora_b: torch.Tensor,
    lora_bias: torch.Tensor | None,
    scaling: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Return y (T, N) in `out_dtype` from x (T, K) in the compute dtype and xa (T, R) as it is saved."""
    dtype, b_scaling = x.dtype, op.b_scaling(scaling, x.dtype)
    b = lora_b.to(dtype) if b_scaling == 1 else (lora_b.float() * b_scaling).to(dtype)
    low, added = (xa, b.t()), total_bias(bias, lora_bias, scaling, dtype)
    if gemv_4bit.serves(weight, x, low, added):
        return gemv_4bit.product(x, weight, low, added, out_dtype)
    return sum_products(low, [(x, weight.to(dtype).t())], added, out_dtype)


def parameter_gradients(
    wanted: Wanted,
    needs_dxa: bool,
    dy: torch.Tensor,
    x: torch.Tensor | None,
    xa: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_b: torch.Tensor,
    lora_bias: torch.Tensor | None,
    scaling: float,
    dxa: torch.Tensor | None = None,
) -> tuple[Gradients, torch.Tensor | None]:
    """Return the gradients of W, b, B and c, and, if `needs_dxa`, scaled dxa (T, R), written to `dxa` if given.

    dy (T, N) and x (T, K) are in the compute dtype.
    """
    gradients, _ = op.base_backward(wanted, False, dy, x, weight, bias, dy.dtype)
    of_adapter, dxa = adapter_gradients(wanted, needs_dxa, dy, xa, lora_b, lora_bias, scaling, dxa)
    return gradients | of_adapter, dxa


def adapter_gradients(
    wanted: Wanted,
    needs_dxa: bool,
    dy: torch.Tensor,
    xa: torch.Tensor,
    lora_b: torch.Tensor,
    lora_bias: torch.Tensor | None,
    scaling: float,
    dxa: torch.Tensor | None = None,
) -> tuple[Gradients, torch.Tensor | None]:
    """Return the gradients of B and c, and dxa like `parameter_gradients`."""
    gradients: Gradients = {}
    if lora_bias is not None and wanted["lora_bias"]:
        gradients["lora_bias"] = (sum_rows(dy) * scaling).to(lora_bias.dtype)
    if needs_dxa or wanted["lora_b"]:
        needs, b_scaling = (needs_dxa, wanted["lora_b"]), op.b_scaling(scaling, dy.dtype)
        dtype = lora_b.dtype if b_scaling == 1 else torch.float32
        dxa, db = low_rank.up_gradients(dy, lora_b, xa, scaling, dtype, needs, dxa)
        gradients["lora_b"] = db if db is None or b_scaling == 1 else (db * b_scaling).to(lora_b.dtype)
    return gradients, dxa


def dropped_out(x: torch.Tensor, seed: torch.Tensor | None, dropout: float | None, dtype: torch.dtype) -> torch.Tensor:
    """Return z (T, K) in `dtype`: x after dropout with `seed`, or x without a seed."""
    tokens = rows(x)
    return tokens.to(dtype) if seed is None or dropout is None else mask.run(tokens, seed, dropout, dtype)


def masked_sum(
    base: torch.Tensor, dz: torch.Tensor, seed: torch.Tensor, dropout: float, dtype: torch.dtype
) -> torch.Tensor:
    """Return base + dz * m (T, K) in `dtype`; base or dz is overwritten if it has that dtype."""
    out = next((t for t in (dz, base) if t.dtype is dtype), None)
    return mask.run(dz, seed, dropout, dtype, base, out)


def serves(
    x: torch.Tensor | None,
    weight: torch.Tensor,
    base_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    out_dtype: torch.dtype,
    **_: Any,
) -> bool:
    """Return whether both paths compute in one dtype, which the GPU supports, and no operand is empty."""
    dtypes_match = base_dtype is lora_dtype and computes(base_dtype, weight.device) and out_dtype in FLOAT_DTYPES
    return dtypes_match and weight.dim() == 2 and weight.numel() > 0 and (x is None or x.numel() > 0)


def forward(
    x: torch.Tensor,
    x_dropped: torch.Tensor | None,
    lora_a: torch.Tensor,
    scaling: float,
    base_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    seed: torch.Tensor | None = None,
    dropout: float | None = None,
    **layer: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    masks.check_argument(seed, dropout, x_dropped)
    tokens = rows(x).to(base_dtype)
    given = x if x_dropped is None else x_dropped
    z = tokens if x_dropped is None and seed is None else dropped_out(given, seed, dropout, base_dtype)
    xa = low_rank.down(z, [lora_a], op.xa_scaling(scaling, base_dtype))
    y = project(tokens, xa, scaling=scaling, **layer)
    return y.view(*x.shape[:-1], y.shape[1]), xa


def serves_backward(grads: list[torch.Tensor], **given: Any) -> bool:
    return serves(**given) and grads[0].numel() > 0


def backward(
    wanted: Wanted,
    grads: list[torch.Tensor],
    x: torch.Tensor | None,
    x_dropped: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    lora_bias: torch.Tensor | None,
    xa: torch.Tensor,
    x_dtype: torch.dtype,
    x_dropped_dtype: torch.dtype | None,
    scaling: float,
    base_dtype: torch.dtype,
    seed: torch.Tensor | None = None,
    dropout: float | None = None,
    **_: Any,
) -> Gradients:
    dy = rows(grads[0]).to(base_dtype)
    z_is_x = x_dropped_dtype is None and seed is None
    tokens = None if x is None or not (z_is_x or wanted["weight"]) else rows(x).to(base_dtype)
    needs_dz = wanted["x"] if x_dropped_dtype is None else wanted["x_dropped"]
    gradients, dxa = parameter_gradients(
        wanted, wanted["lora_a"] or needs_dz, dy, tokens, xa, weight, bias, lora_b, lora_bias, scaling
    )
    low = None
    if dxa is not None:
        given = x if x_dropped_dtype is None else x_dropped
        if wanted["lora_a"] and given is not None:
            z = tokens if z_is_x else dropped_out(given, seed, dropout, base_dtype)
            assert z is not None
            gradients["lora_a"] = low_rank.down_gradient(dxa, z, lora_a.dtype)
        low = (dxa, lora_a.to(base_dtype))
    shape = (*grads[0].shape[:-1], weight.shape[1])
    if wanted["x"]:
        base = (dy, weight.to(base_dtype))
        if seed is None or dropout is None:
            dx = sum_products(low if x_dropped_dtype is None else None, [base], None, x_dtype)
        else:
            assert low is not None
            dx = masked_sum(torch.mm(*base), torch.mm(*low), seed, dropout, x_dtype)
        gradients["x"] = dx.view(shape)
    if x_dropped_dtype is not None and wanted["x_dropped"]:
        assert low is not None
        gradients["x_dropped"] = torch.mm(*low).to(x_dropped_dtype).view(shape)
    return gradients


op.lora_linear.implementation(
    "triton",
    forward=forward,
    backward=backward,
    serves=serves,
    serves_backward=serves_backward,
    traceable=True,
)


def serves_add(base: torch.Tensor, x: torch.Tensor, lora_dtype: torch.dtype, out_dtype: torch.dtype, **_: Any) -> bool:
    dtypes_match = base.dtype is lora_dtype and out_dtype in FLOAT_DTYPES and supported(base)
    return dtypes_match and base.numel() > 0 and x.shape[-1] > 0


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
    xa = low_rank.down(dropped_out(x, seed, dropout, lora_dtype), [lora_a], op.xa_scaling(scaling, lora_dtype))
    b, b_scaling = lora_b.to(lora_dtype).t(), op.b_scaling(scaling, lora_dtype)
    if out_dtype is torch.float32 and lora_dtype in HALF_DTYPES:
        y = addmm_float32(rows(base).float(), xa, b, b_scaling)
    else:
        y = torch.addmm(rows(base), xa, b, alpha=b_scaling)
    if lora_bias is not None:
        y += lora_bias.to(lora_dtype) * scaling
    return with_strides_of(y.to(out_dtype).view(base.shape), base), xa


def serves_add_backward(grads: list[torch.Tensor], lora_a: torch.Tensor, lora_dtype: torch.dtype, **_: Any) -> bool:
    return computes(lora_dtype, lora_a.device) and grads[0].numel() > 0 and lora_a.numel() > 0


def add_backward(
    wanted: Wanted,
    grads: list[torch.Tensor],
    x: torch.Tensor | None,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    lora_bias: torch.Tensor | None,
    xa: torch.Tensor,
    x_dtype: torch.dtype,
    scaling: float,
    lora_dtype: torch.dtype,
    seed: torch.Tensor | None = None,
    dropout: float | None = None,
    **_: Any,
) -> Gradients:
    dy = rows(grads[0]).to(lora_dtype)
    gradients, dxa = adapter_gradients(wanted, wanted["lora_a"] or wanted["x"], dy, xa, lora_b, lora_bias, scaling)
    if wanted["lora_a"]:
        assert dxa is not None
        assert x is not None
        gradients["lora_a"] = low_rank.down_gradient(dxa, dropped_out(x, seed, dropout, lora_dtype), lora_a.dtype)
    if wanted["x"]:
        assert dxa is not None
        dx = dropped_out(dxa @ lora_a.to(lora_dtype), seed, dropout, x_dtype)
        gradients["x"] = dx.view(*grads[0].shape[:-1], lora_a.shape[1])
    return gradients


op.lora_add.implementation(
    "triton",
    forward=add_forward,
    backward=add_backward,
    serves=serves_add,
    serves_backward=serves_add_backward,
    traceable=True,
)
