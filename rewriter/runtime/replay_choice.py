"""Whether replaying a region as CUDA graphs saves time, measured while the region runs.

It does where launching the kernels takes longer than running them, and by more than the copies of a replay take.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

TIMED_RUNS = 3
"""Runs on inputs of the same shapes that are timed before it is decided."""
MAX_LAG = 1.2
"""How much longer than the host a GPU may take that waits for launches. One that takes longer is busy with kernels."""

COPIES_PER_REPLAY = 4
"""How often a replay copies the bytes of the activations: activations, results, and the gradients of both."""
BYTES_PER_SECOND = 1e11
"""Bytes that are worth copying to save a second: a tenth of a GPU's bandwidth, as copies also take memory."""


class Stopwatch(Protocol):
    """Times a run on the host and on the device."""

    def stop(self) -> None:
        """End the run: everything has been launched."""

    def seconds(self) -> tuple[float, float] | None:
        """Return the time on the host and on the device, None until the device is done."""


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


class ReplayTimer:
    """Times runs, and decides by the shapes of their inputs whether replaying pays.

    Args:
        start: starts a stopwatch.
    """

    def __init__(self, start: Callable[[], Stopwatch]) -> None:
        self._start = start
        self._runs: dict[Hashable, list[Stopwatch]] = {}
        self._decided: dict[Hashable, bool] = {}

    def time(self, shapes: Hashable, copied: int) -> Stopwatch | None:
        """Start timing a run, unless it is decided already."""
        if self.replay_pays(shapes, copied) is not None:
            return None
        stopwatch = self._start()
        self._runs.setdefault(shapes, []).append(stopwatch)
        return stopwatch

    def replay_pays(self, shapes: Hashable, copied: int) -> bool | None:
        """Return whether the device waits for the host, for longer than a replay copies `copied` bytes of activations;
        None until enough runs are timed."""
        if shapes not in self._decided:
            found = [seconds for run in self._runs.get(shapes, []) if (seconds := run.seconds()) is not None]
            if len(found) < TIMED_RUNS:
                return None
            waits = statistics.median(device / host for host, device in found) < MAX_LAG
            saved = statistics.median(host for host, _ in found)
            self._decided[shapes] = waits and saved > COPIES_PER_REPLAY * copied / BYTES_PER_SECOND
            del self._runs[shapes]
        return self._decided[shapes]

    def forget(self) -> None:
        self._runs.clear()
        self._decided.clear()
