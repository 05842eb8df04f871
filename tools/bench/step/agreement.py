"""The check that a contender computes the same step as eager: its loss and gradients against the float32 reference.

The error of a tensor is the norm of its difference from the reference, relative to the norm of the reference; the error
of the step is that of all gradients as one vector. A contender passes if, for its `ratio` (`contenders.py`),

    error(step) <= ratio * error(eager's step)
    error(tensor) <= ratio * the largest error of eager's tensors, for every tensor
    error(loss) <= ratio * error(eager's loss) + eps / 2

where eps is that of bfloat16, so that eps / 2 is one rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

_ROUNDING = torch.finfo(torch.bfloat16).eps / 2


@dataclass(frozen=True)
class Errors:
    """Relative errors of the gradients of one run.

    Attributes:
        step: error of all gradients as one vector.
        tensors: error of each gradient by name.
        unmatched: names of gradients that only the run or only the reference has.
    """

    step: float
    tensors: dict[str, float]
    unmatched: list[str]

    @property
    def worst(self) -> str:
        """The name of the tensor with the largest error; nan is larger than any number."""
        return max(self.tensors, key=lambda name: (self.tensors[name] != self.tensors[name], self.tensors[name]))


@dataclass(frozen=True)
class Reference:
    """The float32 reference: the file of its gradients and its loss, with eager's errors and loss."""

    path: Path
    loss: float
    eager: Errors
    eager_loss: float

    @property
    def eager_loss_error(self) -> float:
        return relative_error(self.eager_loss, self.loss)


def errors(actual: Path, expected: Path) -> Errors:
    """Compare two safetensors files of gradients."""
    tensors, squared_difference, squared_norm = {}, 0.0, 0.0
    with safe_open(actual, "pt") as actual_file, safe_open(expected, "pt") as expected_file:
        actual_names, expected_names = set(actual_file.keys()), set(expected_file.keys())
        for name in sorted(actual_names & expected_names):
            gradient = expected_file.get_tensor(name).double()
            difference = (actual_file.get_tensor(name).double() - gradient).norm().item()
            norm = gradient.norm().item()
            tensors[name] = difference / max(norm, torch.finfo(torch.float32).tiny)
            squared_difference, squared_norm = squared_difference + difference**2, squared_norm + norm**2
    step = (squared_difference / squared_norm) ** 0.5 if squared_norm else float("nan")
    return Errors(step, tensors, sorted(actual_names ^ expected_names))


def relative_error(value: float, expected: float) -> float:
    return abs(value - expected) / abs(expected)


def disagreement(found: Errors, loss: float, reference: Reference, ratio: float) -> str | None:
    """Return why a contender's first step is wrong, or None. Errors that are nan are wrong."""
    if found.unmatched:
        return f"{len(found.unmatched)} gradients are missing or unexpected, such as {found.unmatched[0]}"
    if not found.step <= ratio * reference.eager.step:
        return f"gradients: error {found.step:.1e}, more than {ratio:g} times eager's {reference.eager.step:.1e}"
    worst, bound = found.worst, reference.eager.tensors[reference.eager.worst]
    if not found.tensors[worst] <= ratio * bound:
        error = found.tensors[worst]
        return f"gradient of {worst}: error {error:.1e}, more than {ratio:g} times eager's largest, {bound:.1e}"
    loss_error = relative_error(loss, reference.loss)
    if not loss_error <= ratio * reference.eager_loss_error + _ROUNDING:
        return f"loss {loss:.6f}: the reference is {reference.loss:.6f}, and eager's {reference.eager_loss:.6f}"
    return None
