"""By default a region is captured as CUDA graphs only if the device was seen waiting for the host."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from replayed_region import Region, assert_equal, gradients, rows
from torch import nn

import fastlora
from fastlora.runtime.cuda_graphs import RUNS_BEFORE, GraphReplayer
from fastlora.runtime.replay_choice import BYTES_PER_SECOND, COPIES_PER_REPLAY, TIMED_RUNS, ReplayTimer


@dataclass
class Timed:
    """A stopwatch with preset times; None for a device that has not finished."""

    found: tuple[float, float] | None

    def stop(self) -> None: ...

    def seconds(self) -> tuple[float, float] | None:
        return self.found


def paced(*found: tuple[float, float] | None) -> Callable[[], Timed]:
    times = iter(found)
    return lambda: Timed(next(times))


def run(region: Region, times: int, n: int = 3) -> None:
    for _ in range(times):
        region.replays(*region.arguments(rows(n)))[0].sum().backward()


WAITING, BUSY = (3.0, 3.1), (3.0, 5.0)
"""Seconds on the host and on the device, for a device that waits for launches, and for one that is busy."""


def test_a_region_that_the_device_waits_for_is_captured() -> None:
    region = Region(ReplayTimer(paced(*[WAITING] * TIMED_RUNS)))
    run(region, 1 + TIMED_RUNS)
    assert not region.replays.captured
    run(region, 1)
    assert region.replays.captured == 1
    expected = gradients(region, region.run, rows(seed=1))
    region.runs = 0
    assert_equal(gradients(region, region.replays, rows(seed=1)), expected)
    assert region.runs == 0


def test_a_region_that_keeps_the_device_busy_is_not_captured() -> None:
    region = Region(ReplayTimer(paced(*[BUSY] * TIMED_RUNS)))
    run(region, 10)
    assert region.replays.captured == 0
    assert region.notes == []


@pytest.mark.parametrize(("share", "recorded"), [(0.9, 0), (1.1, 1)])
def test_a_region_faster_than_its_copies_is_not_captured(share: float, recorded: int) -> None:
    seconds = share * COPIES_PER_REPLAY * rows(5).nbytes / BYTES_PER_SECOND
    region = Region(ReplayTimer(paced(*[(seconds, seconds)] * TIMED_RUNS)))
    run(region, 2 + TIMED_RUNS, n=5)
    assert region.replays.captured == recorded


def test_the_decision_uses_medians() -> None:
    region = Region(ReplayTimer(paced(WAITING, BUSY, BUSY)))
    run(region, 5)
    assert region.replays.captured == 0
    region = Region(ReplayTimer(paced(BUSY, WAITING, WAITING)))
    run(region, 5)
    assert region.replays.captured == 1


def test_unfinished_runs_do_not_count() -> None:
    region = Region(ReplayTimer(paced(None, None, *[WAITING] * TIMED_RUNS)))
    run(region, 2 + TIMED_RUNS)
    assert not region.replays.captured
    run(region, 2)
    assert region.replays.captured == 1


def test_layers_share_timings_by_shape() -> None:
    timer = ReplayTimer(paced(*[WAITING] * TIMED_RUNS, *[BUSY] * TIMED_RUNS))
    first, second = Region(timer), Region(timer)
    run(first, 1 + TIMED_RUNS)
    run(second, RUNS_BEFORE + 1)
    assert second.replays.captured == 1
    run(first, 2 + TIMED_RUNS, n=5)
    assert first.replays.captured == 0


def test_refusals_are_noted_only_if_replays_are_requested() -> None:
    notes: list[str] = []
    replays = GraphReplayer(lambda x, w: (x @ w, w * 2), Region().recorder, notes.append, ReplayTimer(paced()))
    for _ in range(5):
        replays(rows(grad=False), nn.Parameter(torch.randn(4, 4)))
    assert notes == []
    assert replays.captured == 0


def test_inputs_too_large_to_copy_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora.runtime.cuda_graphs.MAX_COPIED", 3 * 4 * 4 - 1)
    region = Region()
    run(region, 4)
    assert region.replays.captured == 0
    assert "would copy" in region.notes[0]


@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "no-cudagraphs"])
def test_a_model_on_a_cpu_trains_in_every_mode(mode: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.SiLU())
    x = torch.randn(3, 4)
    expected = model(x)
    fastlora.compile(model, mode=mode)
    for _ in range(3):
        y = model(x)
        y.sum().backward()
    assert torch.equal(y, expected)
