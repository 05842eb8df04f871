"""Products and sums with as few roundings as possible, which the formulas of several ops are made of."""

from __future__ import annotations

import torch

Addend = tuple[torch.Tensor, torch.Tensor]
"""A product that stays unevaluated until it is summed with others: (left, right) stands for left @ right."""


def cast(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """Return `t` in `dtype`; None for None."""
    return None if t is None else t.to(dtype)


def rows(t: torch.Tensor) -> torch.Tensor:
    """Return `t` with all dimensions but the last as one: (T, N) for T tokens."""
    return t.reshape(-1, t.shape[-1])


def scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """Return scaling * (left @ right), rounded once."""
    return torch.addmm(left.new_zeros(()), left, right, beta=0, alpha=scaling)


def sum_rows(t: torch.Tensor) -> torch.Tensor:
    """Return the sum over tokens, in float32 or wider."""
    return t.sum(0, dtype=torch.promote_types(t.dtype, torch.float32))


def sum_products(addends: list[Addend], dtype: torch.dtype) -> torch.Tensor:
    """Return the sum of the addends in `dtype`.

    A partial sum has the widest dtype of the operands, so none is rounded more than autograd's, which is rounded to
    `dtype`; and a product of that width joins the sum without a rounding of its own.
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
