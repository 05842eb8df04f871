"""Whether a contender computes the step that eager does: its loss and gradients against the truth, beside eager's.

The error of a tensor is the norm of its difference from the truth over the norm of the truth; the error of the step is
that of all gradients as one vector. A contender agrees where, for its `ratio` (`contenders.py`),

    err(step) <= ratio * err(eager's step)
    err(tensor) <= ratio * the largest err of eager's tensors, for every tensor
    err(loss) <= ratio * err(eager's loss) + eps / 2, with eps that of bfloat16: half of it is one rounding
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

_ROUNDING = torch.finfo(torch.bfloat16).eps / 2


@dataclass(frozen=True)
class Errors:
    """Relative errors of one run's gradients, and the names of those that are there on one side only."""

    step: float
    tensors: dict[str, float]
    unmatched: list[str]

    @property
    def worst(self) -> str:
        """The tensor with the largest error; one that is not a number is larger than any."""
        return max(self.tensors, key=lambda name: (self.tensors[name] != self.tensors[name], self.tensors[name]))


@dataclass(frozen=True)
class Truth:
    """The file of true gradients with the true loss, and what eager makes of them."""

    path: Path
    loss: float
    eager: Errors
    eager_loss: float

    @property
    def eager_loss_error(self) -> float:
        return relative(self.eager_loss, self.loss)


def errors(found: Path, truth: Path) -> Errors:
    """Compares two files of gradients, tensor by tensor."""
    tensors, wrong, size = {}, 0.0, 0.0
    with safe_open(found, "pt") as mine, safe_open(truth, "pt") as true:
        names = set(mine.keys()) & set(true.keys())
        unmatched = sorted(set(mine.keys()) ^ set(true.keys()))
        for name in sorted(names):
            expected = true.get_tensor(name).double()
            difference = (mine.get_tensor(name).double() - expected).norm().item()
            norm = expected.norm().item()
            tensors[name] = difference / max(norm, torch.finfo(torch.float32).tiny)
            wrong, size = wrong + difference**2, size + norm**2
    return Errors((wrong / size) ** 0.5 if size else float("nan"), tensors, unmatched)


def relative(value: float, truth: float) -> float:
    return abs(value - truth) / abs(truth)


def disagreement(found: Errors, loss: float, truth: Truth, ratio: float) -> str | None:
    """What is wrong with a contender's first step; None if nothing is. Errors that are not numbers are wrong."""
    if found.unmatched:
        return f"{len(found.unmatched)} gradients are missing or too many, such as {found.unmatched[0]}"
    if not found.step <= ratio * truth.eager.step:
        return f"gradients: error {found.step:.1e}, more than {ratio:g} times eager's {truth.eager.step:.1e}"
    worst, bound = found.worst, truth.eager.tensors[truth.eager.worst]
    if not found.tensors[worst] <= ratio * bound:
        error = found.tensors[worst]
        return f"gradient of {worst}: error {error:.1e}, more than {ratio:g} times eager's largest, {bound:.1e}"
    loss_error = relative(loss, truth.loss)
    if not loss_error <= ratio * truth.eager_loss_error + _ROUNDING:
        return f"loss {loss:.6f}: it should be {truth.loss:.6f}, and eager's is {truth.eager_loss:.6f}"
    return None
