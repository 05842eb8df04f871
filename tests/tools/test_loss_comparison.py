"""Comparison of two loss curves."""

import math

import pytest

from fastlora.tools.comparison import Comparison


def test_the_largest_relative_difference_has_its_step() -> None:
    comparison = Comparison([4.0, 2.0, 1.0], [4.0, 2.5, 1.1], bound=0.2)
    assert comparison.largest == pytest.approx(0.25)
    assert comparison.largest_step == 2
    assert not comparison.within_bound
    assert Comparison([4.0, 2.0, 1.0], [4.0, 2.5, 1.1], bound=0.3).within_bound


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_non_finite_loss_in_one_run_exceeds_every_bound(value: float) -> None:
    assert not Comparison([1.0, 1.0], [1.0, value], bound=1e9).within_bound
    assert not Comparison([1.0, value], [1.0, 1.0], bound=1e9).within_bound
    assert Comparison([1.0, value], [1.0, value], bound=0.0).within_bound


def test_runs_of_different_length_cannot_be_compared() -> None:
    with pytest.raises(ValueError):
        _ = Comparison([1.0], [1.0, 2.0], bound=1.0).largest
