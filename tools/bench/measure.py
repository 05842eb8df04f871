"""Measuring times and memory on a CUDA device, and the peak rates that times are compared with."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch

REPLAYS = 7
"""Number of measurements, of which the median counts."""
MIN_GRAPH_SECONDS = 2e-3
"""A CUDA graph repeats the calls until it takes about this long, so that gaps between replays are negligible."""


@dataclass(frozen=True)
class Ceilings:
    """Measured peak rates of a GPU.

    Attributes:
        bandwidth: bytes per second of a large copy, reads and writes.
        rate: floating-point operations per second of a large matrix product.
    """

    bandwidth: float
    rate: float

    def limit(self, flops: float, num_bytes: float) -> float:
        """Return the least time in seconds at these rates."""
        return max(flops / self.rate, num_bytes / self.bandwidth)


def device_time(calls: Sequence[Callable[[], object]]) -> float:
    """Return the GPU time of one call in seconds, without the time to launch it.

    The calls do the same on different data, so that their inputs are not in the caches. They are captured in a CUDA
    graph, repeatedly until it is long enough, and the median replay counts. Calls that synchronize with the GPU cannot
    be captured, and are timed directly. The current stream must not be the default stream, and the calls' forward
    passes must have run on it.
    """
    for call in calls:
        call()
    if _synchronizes(calls[0]):
        return statistics.median(_time(call) for _ in range(REPLAYS) for call in calls)
    graph = _capture(calls, 1)
    graph.replay()
    repeats = max(1, min(100, int(MIN_GRAPH_SECONDS / _time(graph.replay))))  # GPU time, as the host takes longer
    if repeats > 1:
        graph = _capture(calls, repeats)
        graph.replay()
    return statistics.median(_time(graph.replay) for _ in range(REPLAYS)) / (repeats * len(calls))


def _capture(calls: Sequence[Callable[[], object]], repeats: int) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call in itertools.chain.from_iterable(itertools.repeat(calls, repeats)):
            call()
    return graph


def _synchronizes(call: Callable[[], object]) -> bool:
    """Return whether a call makes the host wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def host_time(function: Callable[[], object], calls: int = 30) -> float:
    """Return the time of a call in seconds, Python and launches included, when called repeatedly."""

    def run() -> None:
        for _ in range(calls):
            function()

    run()
    torch.cuda.synchronize()
    return statistics.median(_time(run) for _ in range(REPLAYS)) / calls


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def _time(function: Callable[[], object]) -> float:
    started, ended = _events()
    started.record()
    function()
    ended.record()
    ended.synchronize()
    return started.elapsed_time(ended) / 1e3


def extra_memory(function: Callable[[], object]) -> int:
    """Return the peak memory of a call in bytes, beyond what was allocated before; its results count."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = function()
    torch.cuda.synchronize()
    del result
    return torch.cuda.max_memory_allocated() - before


@cache
def ceilings(dtype: torch.dtype) -> Ceilings:
    """Measure the peak rates.

    The data are random, as products of zeros are faster. The copy is not captured, because a CUDA graph runs it as a
    memcpy node, which is slower.
    """
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source).copy_(source)
    copy = statistics.median(_time(lambda: target.copy_(source)) for _ in range(REPLAYS))
    left, right = (torch.randn(8192, 8192, device="cuda").to(dtype) for _ in range(2))
    with torch.cuda.stream(torch.cuda.Stream()):
        product = device_time([lambda: torch.mm(left, right)])
    return Ceilings(2 * source.nbytes / copy, 2 * 8192**3 / product)
