"""Products and sums with as few roundings as possible, shared by the PyTorch implementations."""

from __future__ import annotations

import torch

Addend = tuple[torch.Tensor, torch.Tensor]
"""An unevaluated product left @ right, as (left, right), to be summed with others."""


def cast(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return `t` in `dtype`; None for None."""
    return None if t is None else t.to(dtype)


def rows(t: torch.Tensor) -> torch.Tensor:
    """Return `t` with all leading dimensions flattened to one: (T, N) for T tokens."""
    return t.reshape(-1, t.shape[-1])


def scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return scaling * (left @ right), rounded once."""
    return torch.addmm(left.new_zeros(()), left, right, beta=0, alpha=scaling)


def sum_rows(t: torch.Tensor) -> torch.Tensor:
    """Return the sum over tokens, in float32 or wider."""
    return t.sum(0, dtype=torch.promote_types(t.dtype, torch.float32))


def sum_products(addends: list[Addend], dtype: torch.dtype) -> torch.Tensor:
    """Return the sum of the addends in `dtype`.

    Partial sums have the widest of `dtype` and the operands' dtypes, and products of that dtype are added by `addmm`,
    without a rounding of their own, so no sum is less accurate than autograd's, which is rounded to `dtype`.
    """
    (left, right), *others = addends
    total = left @ right
    wide = dtype
    for operand, _ in addends:
        wide = torch.promote_types(wide, operand.dtype)
    for left, right in others:
        total = total.to(wide)
        total = torch.addmm(total, left, right) if left.dtype == wide else total + left @ right
    return total.to(dtype)
