"""Checks tell rounding errors from wrong gradients, on synthetic steps."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

from fastlora.checking.agreement import STEPS, Compared, Rounding, Steps, compare, float64_mismatch, rounding_of
from fastlora.checking.check import agree
from fastlora.checking.trial import Step
from fastlora.errors import FastLoRAError
from fastlora.frontend.options import Options
from fastlora.frontend.session import Session

FLOAT32 = rounding_of([torch.float32], tensor_cores=False)
TRUE = torch.tensor([3.0, 4.0], dtype=torch.float64)
HALF = Rounding(2**-7, 2**-7)


def step(error: float = 0.0, loss: float = 2.0, **others: torch.Tensor) -> Step:
    """Return a step whose gradient `w` has the relative error `error`."""
    return Step(torch.tensor(loss), {"w": TRUE + error * torch.tensor([0.0, 5.0]), **others})


def of(name: str, runs: list[Steps], within: Rounding = FLOAT32) -> Compared:
    (found,) = (each for each in compare(runs, within) if each.name == name)
    return found


def test_an_error_may_exceed_eagers_by_a_quarter() -> None:
    runs = [Steps(step(mine), step(1e-3), step()) for mine in (1.24e-3, 1.6e-3)]
    assert of("w", runs[:1]).right
    assert not of("w", runs[1:]).right
    assert of("w", runs[:1]).error == pytest.approx(1.24e-3)
    assert of("w", runs[:1]).eager_error == pytest.approx(1e-3)


def test_the_floor_is_a_quarter_of_the_total_eager_error() -> None:
    mine, its, true = (step(error, b=TRUE * factor) for error, factor in ((1e-2, 1.001), (1e-2, 1.0), (0.0, 1.0)))
    assert of("b", [Steps(mine, its, true)]).right
    assert not of("b", [Steps(step(b=TRUE * 1.001), step(b=TRUE), true)]).right


def test_losses_are_compared_like_gradients() -> None:
    assert of("the loss", [Steps(step(loss=2.00001), step(), step())]).right
    assert not of("the loss", [Steps(step(loss=2.001), step(), step())]).right
    assert of("the loss", [Steps(step(loss=2.002), step(loss=2.002), step())]).right


def test_without_float64_the_bound_depends_on_the_dtype() -> None:
    for within, right, wrong in ((FLOAT32, 1.5e-4, 2e-4), (HALF, 0.12, 0.15)):
        assert of("w", [Steps(step(right), step(), None)], within).right
        assert not of("w", [Steps(step(wrong), step(), None)], within).right


def test_a_cancelling_gradient_is_bounded_by_the_largest_one() -> None:
    nothing = {"mine": torch.full((2,), 4e-8), "its": torch.full((2,), 1e-9), "true": torch.zeros(2)}
    mine, its, true = (step(b=value) for value in nothing.values())
    assert of("b", [Steps(mine, its, true)]).right
    assert not of("b", [Steps(step(b=torch.full((2,), 1e-5)), its, true)]).right


@pytest.mark.parametrize(
    ("mine", "its", "true", "right"),
    [
        (math.inf, math.inf, math.inf, True),
        (math.nan, math.nan, 1.0, True),  # overflow where eager overflows
        (1.0, math.inf, 1.0, True),  # no overflow where float64 has none
        (math.inf, 1.0, 1.0, False),
        (1.0, math.nan, math.nan, False),
    ],
)
def test_overflow_is_right_where_eager_or_float64_overflows(mine: float, its: float, true: float, right: bool) -> None:
    values = (torch.tensor([1.0, value]) for value in (mine, its, true))
    assert of("b", [Steps(*(step(b=value) for value in values))]).right is right


def test_an_infinite_gradient_does_not_hide_errors_in_others() -> None:
    overflown = torch.tensor([1.0, math.inf])
    found = [Steps(step(mine, b=overflown), step(b=overflown), step(b=overflown)) for mine in (1e-6, 1e-3)]
    assert of("w", found[:1]).right
    assert not of("w", found[1:]).right


@pytest.mark.parametrize(
    ("dtypes", "tensor_cores", "floor"),
    [
        ([torch.float64], False, 1e-10),
        ([torch.float64, torch.float32], False, 1e-5),
        ([torch.float32], True, 2**-10),
        ([torch.float32, torch.bfloat16], True, 2**-7),
        ([torch.float16], False, 2**-10),
    ],
)
def test_rounding_is_that_of_the_coarsest_dtype(dtypes: list[Any], tensor_cores: bool, floor: float) -> None:
    assert rounding_of(dtypes, tensor_cores).floor == floor


def test_float64_far_from_eager_is_reported_as_a_mismatch() -> None:
    assert float64_mismatch(step(0.1), step()) is None
    assert "60%" in str(float64_mismatch(step(0.6), step()))


class FakeTrial:
    """A fake trial: steps with the given errors, one after another, and eager steps without."""

    def __init__(self, errors: list[float], exact: bool = True) -> None:
        self.model, self.dtypes, self.notes = nn.Linear(2, 1, bias=False), {torch.float32}, []
        self._errors, self._exact, self.taken = errors, exact, 0

    def step(self, slots: Any, exact: bool = False, seed: int = 0) -> Step:
        if exact and not self._exact:
            raise ArithmeticError("no float64")
        if not slots:
            return step(0.0 if exact else 1e-3)
        self.taken += 1
        return step(self._errors[seed])


def judged(trial: Any) -> Any:
    return agree(trial, {trial.model: print}, Session(Options()))


def test_an_error_in_a_single_step_is_not_wrong() -> None:
    trial = FakeTrial([2e-3] * 3 + [1e-3] * (STEPS - 3))
    found = judged(trial)
    assert found
    assert trial.taken == STEPS
    assert found.worst[0].error == pytest.approx(1e-3)


def test_an_error_in_most_steps_is_wrong() -> None:
    trial = FakeTrial([2e-3] * 5 + [1e-3] * (STEPS - 5))
    found = judged(trial)
    assert not found
    assert found.wrong == 1
    assert "w: error of eager 1.0e-03, error 2.0e-03, bound" in str(found)


def test_a_right_step_is_not_repeated() -> None:
    trial = FakeTrial([1e-3])
    assert judged(trial)
    assert trial.taken == 1


def test_the_reason_for_skipping_float64_is_reported() -> None:
    found = judged(FakeTrial([1e-3], exact=False))
    assert found
    assert "ArithmeticError: no float64" in found.skipped[0]
    assert "skipped: no step in float64" in str(found)
    assert "agree with eager PyTorch (" in str(found)
    assert json.loads(found.to_json())["skipped"] == found.skipped


@pytest.mark.parametrize("compiled", [True, False])
def test_missing_all_gradients_is_wrong(compiled: bool) -> None:
    trial: Any = FakeTrial([0.0], exact=False)
    trial.step = lambda slots, **_: step() if bool(slots) is compiled else Step(torch.tensor(2.0), {})
    found = judged(trial)
    assert not found
    assert found.wrong == 0
    assert (found.extra if compiled else found.missing) == ["w"]


def test_gradients_too_small_to_judge_are_reported() -> None:
    trial: Any = FakeTrial([])
    trial.model = nn.Linear(2, 1)
    trial.step = lambda slots, **_: step(faint=torch.full((2,), 1e-9))
    found = judged(trial)
    assert found
    assert any("1 gradients are too small" in note and "faint" in note for note in found.notes)
    assert any("2 trained parameters got no gradient" in note and "bias" in note for note in found.notes)


def test_a_mismatching_float64_step_is_not_used() -> None:
    trial: Any = FakeTrial([])
    trial.step = lambda slots, exact=False: Step(torch.tensor(2.0), {"w": -TRUE if exact else TRUE})
    found = judged(trial)
    assert found
    assert found.loss.float64 is None
    assert "differ from eager's by 200%" in found.skipped[0]


def test_a_model_without_gradients_is_refused() -> None:
    trial: Any = FakeTrial([0.0])
    trial.step = lambda *_, **__: Step(torch.tensor(1.0), {})
    with pytest.raises(FastLoRAError, match="nothing to compare"):
        judged(trial)
