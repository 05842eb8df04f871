"""The adapted linear layer and the adapter alone: `kernels/formulas/lora_linear.py` has the formulas.

Every product is one of two kinds. The large ones are sums (`matmul.py`), in which the low-rank term costs neither a
pass over the output nor a rounding; where cuBLAS is faster it multiplies, and the low-rank term is added onto its
result. The thin ones (`low_rank.py`) are a pass over the activation each, dxa and dB share one.

Adapters are rounded to the dtype of the computation where they are used: in the kernels, or once if they are large.
An input that a seed drops out is made where it is read, and its gradient is masked while it joins the base layer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastlora.kernels.core.devices import FLOATS, HALVES, computes, supported
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.implementations import laid_out
from fastlora.kernels.core.numerics import Addend, rows, sum_rows
from fastlora.kernels.core.quantized_weight import QuantizedWeight
from fastlora.kernels.formulas import dropout as masks
from fastlora.kernels.formulas import lora_linear as op
from fastlora.kernels.triton import dropout as mask
from fastlora.kernels.triton.blocks import gemv_4bit, low_rank, matmul


def total(
    low: Addend | None, products: Sequence[Addend], bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """low_left @ low_right + sum of left @ right (+ bias), rounded to `dtype`.

    `products` has at least one. Our kernel makes only sums with a thin `low`, and those only where it is faster; the
    rest is cuBLAS's.
    """
    lows = [] if low is None else [low]
    if lows and matmul.serves([*lows, *products], bias) is True:
        return matmul.sum_of_products([*lows, *products], bias, dtype=dtype)
    left, right = products[0]
    if dtype is torch.float32 and left.dtype in HALVES:
        return _wide_total([*products, *lows], bias)
    out = torch.mm(left, right) if bias is None else torch.addmm(bias.to(left.dtype), left, right)
    for left, right in [*products[1:], *lows]:
        out.addmm_(left, right)
    return out.to(dtype)


def _wide_total(products: Sequence[Addend], bias: torch.Tensor | None) -> torch.Tensor:
    """The sum of products of 16 bits in float32."""
    (left, right), *others = products
    out = low_rank.wide_product(left, right)
    for left, right in others:
        out = wide_sum(out, left, right)
    return out if bias is None else out.add_(bias)


def wide_sum(t: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float = 1.0) -> torch.Tensor:
    """t + scaling * left @ right in float32, of operands of 16 bits; by cuBLAS, but for Triton's interpreter."""
    if left.is_cuda:
        return torch.addmm(t, left, right, out_dtype=torch.float32, alpha=scaling)
    return t + low_rank.wide_product(left, right) * scaling


def biases(
    bias: torch.Tensor | None, lora_bias: torch.Tensor | None, scaling: float, dtype: torch.dtype
) -> torch.Tensor | None:
    """b + s c: what both paths add to every row, in float32 where both do."""
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
    """y (T, N) of x (T, K), whose dtype is that of the computation, and of xa (T, R) as it is kept."""
    dtype, rest = x.dtype, op.remainder(scaling, x.dtype)
    b = lora_b.to(dtype) if rest == 1 else (lora_b.float() * rest).to(dtype)
    low, added = (xa, b.t()), biases(bias, lora_bias, scaling, dtype)
    if gemv_4bit.serves(weight, x, low, added):
        return gemv_4bit.product(x, weight, low, added, out_dtype)
    return total(low, [(x, weight.to(dtype).t())], added, out_dtype)


def parameter_gradients(
    wanted: Wanted,
    wants_dxa: bool,
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
    """The gradients of W, b, B and c, and dxa (T, R), scaled, if it is wanted; into `dxa` if that is given.

    dy (T, N) and x (T, K) have the dtype of the computation.
    """
    gradients, _ = op.base_backward(wanted, False, dy, x, weight, bias, dy.dtype)
    low, dxa = adapter_gradients(wanted, wants_dxa, dy, xa, lora_b, lora_bias, scaling, dxa)
    return gradients | low, dxa


def adapter_gradients(
    wanted: Wanted,
    wants_dxa: bool,
    dy: torch.Tensor,
    xa: torch.Tensor,
    lora_b: torch.Tensor,
    lora_bias: torch.Tensor | None,
    scaling: float,
    dxa: torch.Tensor | None = None,
) -> tuple[Gradients, torch.Tensor | None]:
    """The gradients of B and c, and dxa, as `parameter_gradients` has them."""
    gradients: Gradients = {}
    if lora_bias is not None and wanted["lora_bias"]:
        gradients["lora_bias"] = (sum_rows(dy) * scaling).to(lora_bias.dtype)
    if wants_dxa or wanted["lora_b"]:
        wants, rest = (wants_dxa, wanted["lora_b"]), op.remainder(scaling, dy.dtype)
        dtype = lora_b.dtype if rest == 1 else torch.float32
        dxa, db = low_rank.up_gradients(dy, lora_b, xa, scaling, dtype, wants, dxa)
        gradients["lora_b"] = db if db is None or rest == 1 else (db * rest).to(lora_b.dtype)
    return gradients, dxa


def dropped_out(x: torch.Tensor, seed: torch.Tensor | None, dropout: float | None, dtype: torch.dtype) -> torch.Tensor:
    """z (T, K) in `dtype`: x behind the dropout of `seed`, if there is one."""
    tokens = rows(x)
    return tokens.to(dtype) if seed is None or dropout is None else mask.run(tokens, seed, dropout, dtype)


def masked_sum(
    base: torch.Tensor, dz: torch.Tensor, seed: torch.Tensor, dropout: float, dtype: torch.dtype
) -> torch.Tensor:
    """dx (T, K) in `dtype` = base + dz * m, in the memory of one of the two where it fits; both are used up."""
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
    """Both paths compute in one dtype, which the GPU has; otherwise roundings differ between them."""
    fits = base_dtype is lora_dtype and computes(base_dtype, weight.device) and out_dtype in FLOATS
    return fits and weight.dim() == 2 and weight.numel() > 0 and (x is None or x.numel() > 0)


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
    xa = low_rank.down(z, [lora_a], op.carried(scaling, base_dtype))
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
    direct = x_dropped_dtype is None and seed is None  # z is x
    tokens = None if x is None or not (direct or wanted["weight"]) else rows(x).to(base_dtype)
    wants_dz = wanted["x"] if x_dropped_dtype is None else wanted["x_dropped"]
    gradients, dxa = parameter_gradients(
        wanted, wanted["lora_a"] or wants_dz, dy, tokens, xa, weight, bias, lora_b, lora_bias, scaling
    )
    low = None
    if dxa is not None:
        given = x if x_dropped_dtype is None else x_dropped
        if wanted["lora_a"] and given is not None:
            z = tokens if direct else dropped_out(given, seed, dropout, base_dtype)
            assert z is not None
            gradients["lora_a"] = low_rank.down_gradient(dxa, z, lora_a.dtype)
        low = (dxa, lora_a.to(base_dtype))
    shape = (*grads[0].shape[:-1], weight.shape[1])
    if wanted["x"]:
        base = (dy, weight.to(base_dtype))
        if seed is None or dropout is None:
            dx = total(low if x_dropped_dtype is None else None, [base], None, x_dtype)
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
    fits = base.dtype is lora_dtype and out_dtype in FLOATS and supported(base)
    return fits and base.numel() > 0 and x.shape[-1] > 0


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
    xa = low_rank.down(dropped_out(x, seed, dropout, lora_dtype), [lora_a], op.carried(scaling, lora_dtype))
    b, rest = lora_b.to(lora_dtype).t(), op.remainder(scaling, lora_dtype)
    if out_dtype is torch.float32 and lora_dtype in HALVES:
        y = wide_sum(rows(base).float(), xa, b, rest)
    else:
        y = torch.addmm(rows(base), xa, b, alpha=rest)
    if lora_bias is not None:
        y += lora_bias.to(lora_dtype) * scaling
    return laid_out(y.to(out_dtype).view(base.shape), base), xa


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
