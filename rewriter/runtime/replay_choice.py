"""Measuring whether replaying a region as CUDA graphs saves time.

It does if launching the kernels takes longer than running them, by more than the copies of a replay take.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

TIMED_RUNS = 3
"""Runs on inputs of the same shapes that are timed before the decision."""
MAX_DEVICE_TO_HOST_TIME = 1.2
"""If the device takes at most this multiple of the host's time, it waits for launches, and is otherwise busy."""

COPIES_PER_REPLAY = 4
"""How often a replay copies the bytes of the activations: activations, results, and the gradients of both."""
BYTES_PER_SECOND = 1e11
"""Bytes worth copying to save a second: a tenth of a GPU's bandwidth, as copies also take memory."""


class Stopwatch(Protocol):
    """Times a run on the host and on the device."""

    def stop(self) -> None:
        """Record the end of the run, after everything was launched."""

    def seconds(self) -> tuple[float, float] | None:
        """Return the times on the host and on the device, None until the device is done."""


class CudaStopwatch:
    """A stopwatch that starts when it is created, on the current stream."""

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
    """Times runs, and decides for each shape of inputs whether replaying saves time.

    Args:
        stopwatch: makes and starts a stopwatch.
    """

    def __init__(self, stopwatch: Callable[[], Stopwatch]) -> None:
        self._stopwatch = stopwatch
        self._runs: dict[Hashable, list[Stopwatch]] = {}
        self._decided: dict[Hashable, bool] = {}

    def start(self, shapes: Hashable, bytes_copied: int) -> Stopwatch | None:
        """Start timing a run, unless the decision was already made."""
        if self.replay_saves_time(shapes, bytes_copied) is not None:
            return None
        stopwatch = self._stopwatch()
        self._runs.setdefault(shapes, []).append(stopwatch)
        return stopwatch

    def replay_saves_time(self, shapes: Hashable, bytes_copied: int) -> bool | None:
        """Return whether the device waits for the host, and for longer than a replay takes to copy `bytes_copied` bytes
        of activations; None until enough runs are timed."""
        if shapes not in self._decided:
            times = [seconds for run in self._runs.get(shapes, []) if (seconds := run.seconds()) is not None]
            if len(times) < TIMED_RUNS:
                return None
            device_waits = statistics.median(device / host for host, device in times) < MAX_DEVICE_TO_HOST_TIME
            saved = statistics.median(host for host, _ in times)
            self._decided[shapes] = device_waits and saved > COPIES_PER_REPLAY * bytes_copied / BYTES_PER_SECOND
            del self._runs[shapes]
        return self._decided[shapes]

    def clear(self) -> None:
        self._runs.clear()
        self._decided.clear()
