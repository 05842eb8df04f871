"""Whether launching a region's kernels takes longer than running them, measured while it runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

ENOUGH = 3
"""Timed runs on inputs of the same shapes, by which the two can be told apart."""
LAG = 1.2
"""A GPU that waits for launches takes as long for a region as the host does; one that is behind takes longer than
that, by this factor at least, as it is the region's kernels that take so long."""


class Stopwatch(Protocol):
    """Times a run on the host and on the device."""

    def stop(self) -> None:
        """Ends the run: everything has been launched."""

    def seconds(self) -> tuple[float, float] | None:
        """How long the host and the device took, once the device is through."""


class CudaStopwatch:
    """A stopwatch that starts now, on the current stream."""

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._begin.record()
        self._started = time.perf_counter()

    def stop(self) -> None:
        self._host = time.perf_counter() - self._started
        self._end.record()

    def seconds(self) -> tuple[float, float] | None:
        return (self._host, self._begin.elapsed_time(self._end) / 1e3) if self._end.query() else None


class Pace:
    """Timed runs, by the shapes of the inputs.

    Args:
        start: starts a stopwatch.
    """

    def __init__(self, start: Callable[[], Stopwatch]) -> None:
        self._start = start
        self._runs: dict[Hashable, list[Stopwatch]] = {}
        self._verdicts: dict[Hashable, bool] = {}

    def time(self, shapes: Hashable) -> Stopwatch | None:
        """Starts timing a run, unless enough is known."""
        if self.is_slow(shapes) is not None:
            return None
        stopwatch = self._start()
        self._runs.setdefault(shapes, []).append(stopwatch)
        return stopwatch

    def is_slow(self, shapes: Hashable) -> bool | None:
        """Whether the device waits for the host, which replaying would spare it; None as long as that is not known."""
        if shapes not in self._verdicts:
            found = [seconds for run in self._runs.get(shapes, []) if (seconds := run.seconds()) is not None]
            if len(found) < ENOUGH:
                return None
            self._verdicts[shapes] = statistics.median(device / host for host, device in found) < LAG
            del self._runs[shapes]
        return self._verdicts[shapes]

    def forget(self) -> None:
        self._runs.clear()
        self._verdicts.clear()
