"""Deciding whether a compiled training step agrees with the eager step: in its loss and in every gradient.

The error of a gradient is the norm of its difference from the float64 gradient, relative to the norm of the latter. It
must not exceed

    1.25 * (error of the eager gradient) + floor + noise

The floor is an error that rounding always explains: it depends on the dtype, and is at least a quarter of the error of
all eager gradients together. The noise is a quarter of one rounding of the largest gradient: a gradient whose terms
cancel, such as that of a key's bias in attention, consists of the rounding errors of others.

In a single step, either of two roundings may be better by chance. So an error beyond its bound is measured again in a
few similar steps, and the median decides. Without float64, the distance from the eager gradient is compared with a
bound that depends only on the dtype.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from fastlora.checking.trial import Step

ERROR_RATIO = 1.25
STEPS = 8
"""Number of steps over which the median is taken."""
LISTED = 10
"""Number of losses and gradients that an `Agreement` lists."""
_LOSS = "the loss"
_FLOAT32, _FLOAT64 = 1e-5, 1e-10
_TF32_EPS = 2.0**-10
"""Spacing of numbers next to 1 in TF32."""
_GRADIENT_RATIO = 16.0
"""Without float64, the largest distance of two gradients as a multiple of the floor; both have errors."""
_LOSS_RATIO = 2.0
"""The same for losses."""
_MAX_EAGER_ERROR = 0.5
"""Error of all eager gradients beyond which the step in float64 is considered another computation."""


@dataclass(frozen=True)
class Compared:
    """The relative error of the loss or of one gradient.

    Attributes:
        name: the parameter, or "the loss".
        error: the error of the compiled step against float64; without float64, its distance from the eager step.
        bound: the largest error that rounding explains.
        eager_error: the error of the eager step against float64; None without float64.
    """

    name: str
    error: float
    bound: float
    eager_error: float | None = None

    @property
    def right(self) -> bool:
        """Whether the error is within its bound."""
        return self.error <= self.bound

    @property
    def excess(self) -> float:
        """The error divided by its bound; infinite if that is not a number."""
        excess = self.error / self.bound if self.bound else self.error
        return math.inf if math.isnan(excess) else excess

    def __str__(self) -> str:
        eager = "distance from eager" if self.eager_error is None else f"error of eager {self.eager_error:.1e}, error"
        return f"{self.name}: {eager} {self.error:.1e}, bound {self.bound:.1e}"


@dataclass(frozen=True)
class Losses:
    """The loss of the compiled step, of the eager step, and of the step in float64 if there was one."""

    compiled: float
    eager: float
    float64: float | None = None


@dataclass(frozen=True)
class Agreement:
    """The result of a check, which is true if the compiled step is right.

    Attributes:
        loss: the losses of the steps.
        compared: the number of gradients that were compared.
        wrong: how many of the loss and the gradients are beyond their bounds.
        worst: the loss and gradients with the largest errors relative to their bounds, ten at most, the largest first.
        missing: parameters that got a gradient in the eager step alone.
        extra: parameters that got a gradient in the compiled step alone.
        fused: the number of sites that fastlora has fused.
        skipped: checks that were skipped, and why.
        notes: further notes on the comparison.
    """

    loss: Losses
    compared: int
    wrong: int
    worst: list[Compared]
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    fused: int = 0
    skipped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """Whether all errors are within their bounds, and the same parameters got gradients."""
        return not (self.wrong or self.missing or self.extra)

    def __bool__(self) -> bool:
        return self.right

    def __str__(self) -> str:
        lines = [self._verdict()]
        lines += [f"  {each}" for each in self.worst if not each.right]
        lines += [f"  {name}: got a gradient in the eager step alone" for name in self.missing[:LISTED]]
        lines += [f"  {name}: got a gradient in the compiled step alone" for name in self.extra[:LISTED]]
        if not self.right:
            lines.append(
                "Please report this. Until it is fixed, use fastlora.disable(model), or check whether "
                "fastlora.compile(model, defer_logits=False) is right."
            )
        return "\n".join([*lines, *(f"skipped: {why}" for why in self.skipped), *(f"note: {n}" for n in self.notes)])

    def _verdict(self) -> str:
        reference = "eager PyTorch" if self.loss.float64 is None else "eager PyTorch and float64"
        what = f"the loss and {self.compared} gradients of one training step with {self.fused} fused sites"
        if self.right:
            return f"right: {what} agree with {reference} (largest error relative to its bound: {self.worst[0]})."
        unmatched = len(self.missing) + len(self.extra)
        compared = f"wrong: {what} were compared with {reference}"
        return f"{compared}; {self.wrong} are beyond their bounds, {unmatched} unmatched."

    def to_json(self) -> str:
        """Return the result as JSON with the field names of this class; a number that is not finite is null."""
        return json.dumps({"right": self.right, **_finite(asdict(self))}, indent=2, allow_nan=False)


class Steps(NamedTuple):
    """One training step run compiled, eager, and in float64 if that is possible."""

    compiled: Step
    eager: Step
    exact: Step | None


class Rounding(NamedTuple):
    """The spacing of numbers next to 1, and the relative error that rounding always explains."""

    eps: float
    floor: float


def rounding_of(dtypes: Iterable[torch.dtype], tensor_cores: bool) -> Rounding:
    """Return the rounding of a model that computes in these dtypes.

    Args:
        dtypes: the dtypes; the coarsest counts.
        tensor_cores: whether float32 products may be computed in TF32.
    """
    dtypes = set(dtypes)
    eps = max((torch.finfo(dtype).eps for dtype in dtypes), default=torch.finfo(torch.float32).eps)
    if torch.float32 in dtypes and tensor_cores:
        eps = max(eps, _TF32_EPS)
    if eps > torch.finfo(torch.float32).eps:
        return Rounding(eps, eps)
    return Rounding(eps, _FLOAT64 if eps < torch.finfo(torch.float32).eps else _FLOAT32)


def float64_mismatch(eager: Step, exact: Step) -> str | None:
    """Return why the step in float64 does not compute the same as the eager step, or None if it may."""
    error = _total_error(eager, exact)
    if error <= _MAX_EAGER_ERROR:
        return None
    return f"its gradients differ from eager's by {error:.0%}, more than rounding explains"


def compare(runs: Sequence[Steps], rounding: Rounding, names: Iterable[str] | None = None) -> list[Compared]:
    """Compare the loss and the gradients that the compiled and the eager step have in common.

    Args:
        runs: similar steps; the result is the median over them. Either all or none have a step in float64.
        rounding: the rounding of the dtypes that the model computes in.
        names: the losses and gradients to compare; None for all.
    """
    measured = [_measure(steps, rounding) for steps in runs]
    return [_median(name, [each[name] for each in measured]) for name in (measured[0] if names is None else names)]


def _measure(steps: Steps, rounding: Rounding) -> dict[str, Compared]:
    compiled, eager, exact = steps
    largest = max(filter(math.isfinite, map(_norm, eager.gradients.values())), default=0.0)
    floor = rounding.floor if exact is None else max(rounding.floor, _total_error(eager, exact) / 4)
    found = {_LOSS: _compared(_LOSS, compiled.loss, eager.loss, None if exact is None else exact.loss, floor, 0.0)}
    for name in eager.gradients.keys() & compiled.gradients.keys():
        truth = exact.gradients.get(name) if exact is not None else None
        tensors = compiled.gradients[name], eager.gradients[name], truth
        found[name] = _compared(name, *tensors, floor, rounding.eps / 4 * largest)
    return found


def _compared(
    name: str, compiled: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor | None, floor: float, noise: float
) -> Compared:
    reference = eager if exact is None else exact
    finite = compiled.isfinite(), eager.isfinite(), reference.isfinite()
    all_finite = finite[0] & finite[1] & finite[2]
    compiled, eager, reference = (
        torch.where(all_finite, t.detach().double(), 0.0) for t in (compiled, eager, reference)
    )
    size = max(_norm(reference), noise) or 1.0
    # the compiled step may overflow where eager or float64 does
    same_overflow = any(torch.equal(finite[0], other) for other in finite[1:])
    error = _norm(compiled - reference) / size if same_overflow else math.inf
    if exact is None:
        ratio = _LOSS_RATIO if name == _LOSS else _GRADIENT_RATIO
        return Compared(name, error, ratio * floor + noise / size)
    eager_error = _norm(eager - reference) / size
    return Compared(name, error, ERROR_RATIO * eager_error + floor + noise / size, eager_error)


def _median(name: str, found: Sequence[Compared]) -> Compared:
    eagers = [each.eager_error for each in found if each.eager_error is not None]
    error, bound = (statistics.median(values) for values in zip(*((c.error, c.bound) for c in found), strict=True))
    return Compared(name, error, bound, statistics.median(eagers) if eagers else None)


def _total_error(step: Step, exact: Step) -> float:
    """Return the relative error of all finite gradients as one vector."""
    squared_error = squared_norm = 0.0
    for name in step.gradients.keys() & exact.gradients.keys():
        gradient, truth = (each.gradients[name].double() for each in (step, exact))
        error, norm = _norm(gradient - truth), _norm(truth)
        if math.isfinite(error) and math.isfinite(norm):
            squared_error, squared_norm = squared_error + error**2, squared_norm + norm**2
    return (squared_error / squared_norm) ** 0.5 if squared_norm else 0.0


def _norm(tensor: torch.Tensor) -> float:
    return float(tensor.double().norm())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
