"""Times and memory on a CUDA device, and the ceilings that a time is compared with."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

REPLAYS = 7
"""Replays of a captured graph; the median counts."""
SHORTEST = 2e-3
"""A graph repeats its work until it takes about this many seconds, so that gaps between replays do not matter."""


@dataclass(frozen=True)
class Ceilings:
    """What this GPU reaches: bytes per second in a large copy, read and written; operations per second in a product."""

    bandwidth: float
    rate: float

    def limit(self, flops: float, moved: float) -> float:
        """The least seconds for so many operations and bytes."""
        return max(flops / self.rate, moved / self.bandwidth)


def device_time(calls: Sequence[Callable[[], object]]) -> float:
    """Seconds of GPU time of one call, without the time that the host takes to launch it.

    The calls do the same to different data, so that caches do not hold what is read. They are captured in a CUDA graph,
    over and over until it is long enough; the median replay counts. Must run on a stream that is not the default one,
    where the calls' forward passes ran too. Work in which the host waits for the GPU cannot be captured: it is timed as
    it runs.
    """
    for call in calls:
        call()
    if _waits(calls[0]):
        return statistics.median(_timed(call) for _ in range(REPLAYS) for call in calls)
    graph = _captured(calls, 1)
    graph.replay()
    repeats = max(1, min(100, int(SHORTEST / _timed(graph.replay))))  # the host's time would say too few
    if repeats > 1:
        graph = _captured(calls, repeats)
        graph.replay()
    return statistics.median(_timed(graph.replay) for _ in range(REPLAYS)) / (repeats * len(calls))


def _captured(calls: Sequence[Callable[[], object]], repeats: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call in itertools.chain.from_iterable(itertools.repeat(calls, repeats)):
            call()
    return graph


def _waits(call: Callable[[], object]) -> bool:
    """Whether the host waits for the GPU in a call."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def host_time(function: Callable[[], object], calls: int = 30) -> float:
    """Seconds of one call among many as a training loop makes them, launches and Python included; the median counts."""

    def run() -> None:
        for _ in range(calls):
            function()

    run()
    torch.cuda.synchronize()
    return statistics.median(_timed(run) for _ in range(REPLAYS)) / calls


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _timed(function: Callable[[], object]) -> float:
    started, ended = _events()
    started.record()
    function()
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended) / 1e3


def extra_memory(function: Callable[[], object]) -> int:
    """The most bytes that a call holds at a time beyond what was there before, its results included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


@cache
def ceilings(dtype: torch.dtype) -> Ceilings:
    """Measured on random data: on zeros a product runs faster than on any real one.

    The copy is not captured: in a graph it is another operation, and slower.
    """
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source).copy_(source)
    copy = statistics.median(_timed(lambda: target.copy_(source)) for _ in range(REPLAYS))
    left, right = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
    with torch.cuda.stream(torch.cuda.Stream()):
        product = device_time([lambda: torch.mm(left, right)])
    return Ceilings(2 * source.nbytes / copy, 2 * 8192**3 / product)
