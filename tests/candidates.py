"""Assertions on the candidates of a function, and on why they are not fused."""

from __future__ import annotations

from collections.abc import Callable

from graphs import Outcome, analyse
from torch import Tensor

Function = Callable[..., Tensor]


def _seen(outcome: Outcome, family: str) -> int:
    return sum(len(made.anchors.get(family, {})) for made in outcome.rewrites)


def assert_one(function: Function, inputs: tuple[Tensor, ...], family: str, reason: str | None) -> None:
    """Assert that there is one candidate, which is fused, or missed for only this reason."""
    outcome = analyse(function, *inputs)
    reasons = [miss.reason for miss in outcome.misses if miss.op == family]
    assert _seen(outcome, family) == 1
    assert len(reasons) == (reason is not None), reasons
    assert reason is None or reason in reasons[0], reasons


def assert_none(function: Function, inputs: tuple[Tensor, ...], family: str) -> None:
    assert _seen(outcome := analyse(function, *inputs), family) == 0, outcome.missed()
