"""The loss of rows of logits and its gradient; `linear_cross_entropy.py` has the formulas and the notation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Loss:
    """The options of the loss."""

    scale: float
    softcap: float
    ignore_index: int
    label_smoothing: float
    z_loss: float


def cap(logits: torch.Tensor, loss: Loss) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return z, and tanh(l / softcap), from the head's output l; without a soft-cap z is l, and there is no tanh."""
    logits = logits * loss.scale
    if loss.softcap <= 0:
        return logits, None
    t = torch.tanh(logits / loss.softcap)
    return loss.softcap * t, t


def token_loss(z: torch.Tensor, labels: torch.Tensor, loss: Loss) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of each row of z, and lse as two columns, max(z) and log(sum(exp(z - max))).

    They are not added, since p = exp(z - max - log_sum) would lose precision for large z.
    """
    peak = z.amax(-1, keepdim=True)
    below = z - peak
    log_sum = below.exp().sum(-1, keepdim=True).log()
    # nll_loss selects -below[label], is 0 for ignored rows, and raises for labels out of range
    value = log_sum[:, 0] + F.nll_loss(below, labels, ignore_index=loss.ignore_index, reduction="none")
    if loss.label_smoothing > 0:
        value = (1 - loss.label_smoothing) * value + loss.label_smoothing * (log_sum[:, 0] - below.mean(-1))
    if loss.z_loss != 0:
        value = value + loss.z_loss * (peak + log_sum)[:, 0].square()
    return value.masked_fill(labels == loss.ignore_index, 0), peak, log_sum


def logits_gradient(
    z: torch.Tensor,
    t: torch.Tensor | None,
    peak: torch.Tensor,
    log_sum: torch.Tensor,
    labels: torch.Tensor,
    g: torch.Tensor,
    loss: Loss,
) -> torch.Tensor:
    """Return dl from the gradient g of each token's loss, (T,) or one number for all; 0 for ignored tokens."""
    g = g.expand(labels.shape)[:, None]
    ignored = (labels == loss.ignore_index)[:, None]
    dz = (z - peak - log_sum).exp() * (g * (1 + 2 * loss.z_loss * (peak + log_sum)))
    if loss.label_smoothing > 0:
        dz -= g * (loss.label_smoothing / z.shape[-1])
    dz.scatter_add_(-1, labels[:, None].masked_fill(ignored, 0), g * (loss.label_smoothing - 1))
    if t is not None:
        dz *= 1 - t * t
    return (dz * loss.scale).masked_fill_(ignored, 0)


def unit_gradient(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, reduction: str, label_smoothing: float
) -> torch.Tensor:
    """Return the gradient of a cross-entropy for its logits (T, V), in float32 or wider, if that of its result is 1."""
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = Loss(1.0, 0.0, ignore_index, label_smoothing, 0.0)
    _, peak, log_sum = token_loss(z, labels, loss)
    g = z.new_ones(())
    g = g / (labels != ignore_index).sum() if reduction == "mean" else g
    return logits_gradient(z, None, peak, log_sum, labels, g, loss)


def scaled_gradient(unit: torch.Tensor, g: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return `unit_gradient`'s result times g, () or (T,); rows that are not `kept` stay 0 for any g."""
    factor = g.to(unit.dtype).expand(kept.shape)
    return (unit * factor[:, None]).masked_fill_(~kept[:, None], 0)
