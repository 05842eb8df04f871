"""Which calls of a forward move what they keep, and which make it again, for a budget of activations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlora.errors import FastLoRAError
from fastlora.runtime.memory_planner import KEEP, LEAST, Choice, Needs, choose, left, parse

MOVE, SPARE = Choice(moves=True), Choice(spares=True)
LAYERS = [Needs(100, 60, flops=10.0)] * 4


def kept(calls: list[Needs], choices: list[Choice]) -> int:
    return sum(left(call, choice) for call, choice in zip(calls, choices, strict=True))


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("1.5 MB", 1_500_000), ("700", 700), (0, 0), (12, 12), ("3B", 3), (None, None)],
)
def test_budgets_are_read_with_their_units(text: str | int | None, size: int | None) -> None:
    assert parse(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", -1, 1.5, True, "1 gb"])
def test_what_is_no_budget_is_named(text: object) -> None:
    with pytest.raises(FastLoRAError, match="memory_budget="):
        parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("budget", "bytes_per_flop", "expected"),
    [
        (400, 100.0, [KEEP] * 4),
        (300, 100.0, [MOVE, KEEP, KEEP, KEEP]),
        (210, 2.5, [MOVE, SPARE, SPARE, KEEP]),  # 100 bytes can be moved for nothing
        (340, 0.0, [SPARE, KEEP, KEEP, KEEP]),
        (160, 0.0, [SPARE] * 4),
        (90, 0.0, [LEAST, LEAST, SPARE, SPARE]),
        (115, 0.0, [LEAST, LEAST, SPARE, SPARE]),
        (140, 0.0, [LEAST, SPARE, SPARE, SPARE]),  # moving a second one is not free
        (100, 2.5, [LEAST, LEAST, SPARE, SPARE]),
        (100, 3.0, [LEAST, LEAST, LEAST, KEEP]),  # 120 bytes can be moved for nothing
        (0, 100.0, [MOVE] * 4),
        (0, 0.0, [LEAST] * 4),
    ],
)
def test_what_costs_nothing_comes_first(budget: int, bytes_per_flop: float, expected: list[Choice]) -> None:
    assert choose(LAYERS, budget, bytes_per_flop) == expected


@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.floats(0, 99)), max_size=8),
    st.integers(0, 999),
    st.floats(0, 9),
)
def test_the_budget_is_met_by_no_more_than_it_takes(
    drawn: list[tuple[int, int, float]], budget: int, bytes_per_flop: float
) -> None:
    calls = [Needs(kept, min(kept, spared), flops) for kept, spared, flops in drawn]
    choices = choose(calls, budget, bytes_per_flop)
    assert kept(calls, choices) <= budget
    for i, choice in enumerate(choices):
        if choice in (MOVE, SPARE):
            less = [*choices[:i], KEEP, *choices[i + 1 :]]
            assert calls[i].kept == 0 or kept(calls, less) > kept(calls, choices)
    if sum(call.kept for call in calls) <= budget:
        assert choices == [KEEP] * len(calls)
