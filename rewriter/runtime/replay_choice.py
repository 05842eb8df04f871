"""Whether replaying a region would save time: whether launching its kernels takes longer than running them, measured
while it runs, and longer than the copies that a replay needs."""

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

COPIES = 4
"""How often a replay copies as many bytes as the activations have: activations, results, and the gradients of both."""
RATE = 1e11
"""Bytes that are worth copying for a second less: a tenth of what a GPU copies, as what is copied is kept too."""


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

    def time(self, shapes: Hashable, copied: int) -> Stopwatch | None:
        """Starts timing a run, unless enough is known."""
        if self.pays(shapes, copied) is not None:
            return None
        stopwatch = self._start()
        self._runs.setdefault(shapes, []).append(stopwatch)
        return stopwatch

    def pays(self, shapes: Hashable, copied: int) -> bool | None:
        """Whether the device waits for the host, which replaying would spare it, for so long that it is worth copying
        the `copied` bytes of activations; None as long as that is not known."""
        if shapes not in self._verdicts:
            found = [seconds for run in self._runs.get(shapes, []) if (seconds := run.seconds()) is not None]
            if len(found) < ENOUGH:
                return None
            waits = statistics.median(device / host for host, device in found) < LAG
            spared = statistics.median(host for host, _ in found)
            self._verdicts[shapes] = waits and spared > COPIES * copied / RATE
            del self._runs[shapes]
        return self._verdicts[shapes]

    def forget(self) -> None:
        self._runs.clear()
        self._verdicts.clear()
