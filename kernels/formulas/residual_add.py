"""What the norms share of the residual addition before them, where x may be dropped out first:

    z = (x * m).to(x's dtype)        the mask m of `dropout.py`, from a `seed` and a probability; without these z is x
    total = residual + z             rounded to the wider of the two dtypes
    y = norm(total)

Backward.  The sum's gradient is what the norm makes of dy, dh, and what it receives itself as the residual stream that
goes on:

    dtotal_all = dh + dtotal         dresidual = dtotal_all        dx = dtotal_all * m

so without dropout both operands have one gradient, which is one tensor.  With it the mask is made again; nothing is
kept for it but the seed.  The product is made before dtotal_all is rounded, in the dtype of the norm's computation.

Shapes: residual, x and total (..., H); seed one int64.  z has x's layout in memory, as PyTorch's dropout gives it.
"""

from __future__ import annotations

import torch

from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.implementations import laid_out
from fastlora.kernels.formulas import dropout as masks


def reference(
    residual: torch.Tensor, x: torch.Tensor, seed: torch.Tensor | None, dropout: float | None
) -> torch.Tensor:
    """The sum, in plain PyTorch.

    Raises:
        ValueError: if only one of `seed` and `dropout` is given, or no mask can be drawn from them.
    """
    masks.check_argument(seed, dropout)
    if seed is not None and dropout is not None:
        x = laid_out(masks.reference(x, None, seed, dropout, x.dtype), x)
    return residual + x


def forward(residual: torch.Tensor, x: torch.Tensor, seed: torch.Tensor | None, dropout: float | None) -> torch.Tensor:
    """The same, with the mask by the form that runs on x's device."""
    masks.check_argument(seed, dropout)
    if seed is not None:
        x = laid_out(masks.dropped_out(x, seed, dropout, x.dtype), x)
    return residual + x


def backward(
    wanted: Wanted,
    dh: torch.Tensor | None,
    dtotal: torch.Tensor | None,
    total: torch.Tensor,
    seed: torch.Tensor | None,
    dropout: float | None,
) -> Gradients:
    """The gradients of the operands in total's dtype and layout; without a seed that of both is the residual's.

    Args:
        wanted: "residual" and "x" are read.
        dh: the sum's gradient through the norm, in the dtype of its computation; None if the norm was not used.
        dtotal: the sum's own gradient; None if only the norm was used.
    """
    gradients: Gradients = {}
    if not (wanted["residual"] or wanted["x"]):
        return gradients
    everything = dtotal if dh is None else dh if dtotal is None else dh + dtotal
    assert everything is not None
    if wanted["residual"]:
        own = everything.to(total.dtype, copy=dh is None)  # an operator may not return what it was given
        gradients["residual"] = laid_out(own, total)
    if wanted["x"]:
        gradients["x"] = laid_out(masks.dropped_out(everything, seed, dropout, total.dtype), total)
    return gradients
