"""The residual addition before a norm, with optional dropout of x; shared by both norms.

    z = (x * m).to(x's dtype)        the mask m of `dropout.py`, from a `seed` and a probability; without these z is x
    total = residual + z             rounded to the wider of the two dtypes
    y = norm(total)

Backward.  The sum's gradient is dh, from the norm, plus dtotal, from the residual stream:

    dtotal_all = dh + dtotal         dresidual = dtotal_all        dx = dtotal_all * m

so without dropout both operands share one gradient tensor.  With dropout the mask is recomputed from the saved seed,
and the product is computed before dtotal_all is rounded, in the norm's compute dtype.

Shapes: residual, x and total (..., H); seed one int64.  z has x's strides, as with PyTorch's dropout.
"""

from __future__ import annotations

import torch

from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.implementations import with_strides_of
from fastlora.kernels.formulas import dropout as masks


def reference(
    residual: torch.Tensor, x: torch.Tensor, seed: torch.Tensor | None, dropout: float | None
) -> torch.Tensor:
    """Return the sum, in plain PyTorch.

    Raises:
        ValueError: if only one of `seed` and `dropout` is given, or they are invalid.
    """
    masks.check_argument(seed, dropout)
    if seed is not None and dropout is not None:
        x = with_strides_of(masks.reference(x, None, seed, dropout, x.dtype), x)
    return residual + x


def forward(residual: torch.Tensor, x: torch.Tensor, seed: torch.Tensor | None, dropout: float | None) -> torch.Tensor:
    """Return the sum, with dropout by the op's implementation for x's device."""
    masks.check_argument(seed, dropout)
    if seed is not None:
        x = with_strides_of(masks.dropped_out(x, seed, dropout, x.dtype), x)
    return residual + x


def backward(
    wanted: Wanted,
    dh: torch.Tensor | None,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    seed: torch.Tensor | None,
    dropout: float | None,
) -> Gradients:
    """Return the gradients of residual and x in total's dtype and strides.

    Args:
        wanted: which gradients to compute; "residual" and "x" are read.
        dh: the sum's gradient through the norm, in the norm's compute dtype; None if the norm was not used.
        dtotal: the sum's own gradient; None if only the norm was used.
        total: the sum.
        seed, dropout: those of the forward.
    """
    gradients: Gradients = {}
    if not (wanted["residual"] or wanted["x"]):
        return gradients
    dtotal_all = dtotal if dh is None else dh if dtotal is None else dh + dtotal
    assert dtotal_all is not None
    if wanted["residual"]:
        dresidual = dtotal_all.to(total.dtype, copy=dh is None)  # an operator may not return one of its inputs
        gradients["residual"] = with_strides_of(dresidual, total)
    if wanted["x"]:
        gradients["x"] = with_strides_of(masks.dropped_out(dtotal_all, seed, dropout, total.dtype), total)
    return gradients
