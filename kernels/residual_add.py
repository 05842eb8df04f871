"""What the norms share of the residual addition before them:  total = residual + x,  y = norm(total).

Backward.  The sum has the gradient that the norm leaves of dy, dh, and what it receives itself as the residual stream
that goes on; both operands receive all of it:

    dresidual = dx = dh + dtotal
"""

from __future__ import annotations

import torch

from fastlora.kernels.forms import laid_out
from fastlora.kernels.op import Gradients, Wanted


def backward(wanted: Wanted, dh: torch.Tensor | None, dtotal: torch.Tensor | None, total: torch.Tensor) -> Gradients:
    """The gradient of both operands, under the name of the first, laid out as `total` is.

    Args:
        wanted: only "residual" is read.
        dh: the sum's gradient through the norm, in the dtype of its computation; None if the norm was not used.
        dtotal: the sum's own gradient; None if only the norm was used.
    """
    if not wanted["residual"]:
        return {}
    if dh is None:
        assert dtotal is not None
        gradient = dtotal.clone()  # an operator may not return what it was given
    else:
        gradient = dh if dtotal is None else dh + dtotal
    return {"residual": laid_out(gradient.to(total.dtype), total)}
