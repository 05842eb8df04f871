"""Comparison of the losses of two runs over the same steps."""

import math
from dataclasses import dataclass

FLOAT32_BOUND, BFLOAT16_BOUND = 1e-3, 2e-2


@dataclass(frozen=True)
class Comparison:
    """Relative differences of the losses per step; infinite where only one loss is finite."""

    eager: list[float]
    fused: list[float]
    bound: float

    @property
    def differences(self) -> list[float]:
        return [_relative(a, b) for a, b in zip(self.eager, self.fused, strict=True)]

    @property
    def largest(self) -> float:
        return max(self.differences)

    @property
    def largest_step(self) -> int:
        """The step with the largest difference, counted from 1."""
        return self.differences.index(self.largest) + 1

    @property
    def within_bound(self) -> bool:
        return self.largest <= self.bound


def _relative(reference: float, value: float) -> float:
    if math.isfinite(reference) and math.isfinite(value):
        return abs(value - reference) / abs(reference) if reference else abs(value)
    same = reference == value or (math.isnan(reference) and math.isnan(value))
    return 0.0 if same else math.inf
