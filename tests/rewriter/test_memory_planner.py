"""Which calls of a forward offload their activations, and which recompute them, for a memory budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlora.errors import FastLoRAError
from fastlora.runtime.memory_planner import KEEP, KEEP_LEAST, Activations, Decision, bytes_kept, parse_bytes, plan

OFFLOAD, RECOMPUTE = Decision(offload=True), Decision(recompute=True)
LAYERS = [Activations(100, 60, flops=10.0)] * 4


def kept(calls: list[Activations], decisions: list[Decision]) -> int:
    return sum(bytes_kept(call, decision) for call, decision in zip(calls, decisions, strict=True))


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("1.5 MB", 1_500_000), ("700", 700), (0, 0), (12, 12), ("3B", 3), (None, None)],
)
def test_budgets_are_parsed_with_units(text: str | int | None, size: int | None) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", -1, 1.5, True, "1 gb"])
def test_an_invalid_budget_is_an_error(text: object) -> None:
    with pytest.raises(FastLoRAError, match="memory_budget must be"):
        parse_bytes(text)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("budget", "bytes_per_flop", "expected"),
    [
        (400, 100.0, [KEEP] * 4),
        (300, 100.0, [OFFLOAD, KEEP, KEEP, KEEP]),
        (210, 2.5, [OFFLOAD, RECOMPUTE, RECOMPUTE, KEEP]),  # 100 bytes can be offloaded for free
        (340, 0.0, [RECOMPUTE, KEEP, KEEP, KEEP]),
        (160, 0.0, [RECOMPUTE] * 4),
        (90, 0.0, [KEEP_LEAST, KEEP_LEAST, RECOMPUTE, RECOMPUTE]),
        (115, 0.0, [KEEP_LEAST, KEEP_LEAST, RECOMPUTE, RECOMPUTE]),
        (140, 0.0, [KEEP_LEAST, RECOMPUTE, RECOMPUTE, RECOMPUTE]),  # offloading a second one is not free
        (100, 2.5, [KEEP_LEAST, KEEP_LEAST, RECOMPUTE, RECOMPUTE]),
        (100, 3.0, [KEEP_LEAST, KEEP_LEAST, KEEP_LEAST, KEEP]),  # 120 bytes can be offloaded for free
        (0, 100.0, [OFFLOAD] * 4),
        (0, 0.0, [KEEP_LEAST] * 4),
    ],
)
def test_free_savings_are_planned_first(budget: int, bytes_per_flop: float, expected: list[Decision]) -> None:
    assert plan(LAYERS, budget, bytes_per_flop) == expected


@given(
    st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99), st.floats(0, 99)), max_size=8),
    st.integers(0, 999),
    st.floats(0, 9),
)
def test_plans_meet_the_budget_with_no_unneeded_saving(
    drawn: list[tuple[int, int, float]], budget: int, bytes_per_flop: float
) -> None:
    calls = [Activations(saved, min(saved, recomputable), flops) for saved, recomputable, flops in drawn]
    decisions = plan(calls, budget, bytes_per_flop)
    assert kept(calls, decisions) <= budget
    for i, decision in enumerate(decisions):
        if decision in (OFFLOAD, RECOMPUTE):
            less = [*decisions[:i], KEEP, *decisions[i + 1 :]]
            assert calls[i].saved == 0 or kept(calls, less) > kept(calls, decisions)
    if sum(call.saved for call in calls) <= budget:
        assert decisions == [KEEP] * len(calls)
