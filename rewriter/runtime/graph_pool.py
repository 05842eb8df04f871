"""Capturing functions as CUDA graphs, and which of these may be replayed, given the memory that they share."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, cast

import torch

MAX_SHARE = 0.25
"""The part of a device's memory that the CUDA graphs of a model may take."""


class Recorded(Protocol):
    """A captured forward: its place in the order of capture, and whether its backward may still come."""

    number: int

    @property
    def busy(self) -> bool: ...


class Recorder(ABC):
    """Captures functions, so that they can be replayed in the same memory, and knows what a replay overwrites."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._begun: dict[int, Recorded] = {}

    @abstractmethod
    def record(self, function: Callable[[], Any], transient: bool) -> tuple[Any, Callable[[], None]]:
        """Run a function once; return its result, whose memory is kept, and a function that replays it there.

        A `transient` result is copied right after each replay; any other must last, with what the function saved for
        its backward, until the backward has run.
        """

    @abstractmethod
    def place(self) -> torch.device | None:
        """Return the device on which functions can be captured now."""

    @property
    @abstractmethod
    def full(self) -> bool:
        """Whether captures have taken as much memory as they may."""

    def number(self) -> int:
        return next(self._numbers)

    def forget(self) -> None:
        """Free all memory that no backward will read."""
        self._begun.clear()

    def begin(self, recording: Recorded) -> None:
        """Note that a forward was replayed whose backward may come."""
        self._begun[recording.number] = recording

    def is_free(self, recording: Recorded) -> bool:
        """Whether replaying its forward now overwrites nothing that a backward will read.

        Memory that a forward has freed by its end may hold the results of those that were captured after it.
        """
        self._begun = {number: other for number, other in self._begun.items() if other.busy}
        return all(number < recording.number for number in self._begun)


class CudaGraphs(Recorder):
    """Captures on GPUs, as CUDA graphs.

    The graphs of a device have their memory from two pools, forwards from one, so that what they save is never what a
    backward overwrites. Graphs that share a pool have to be replayed one after the other, hence on one stream.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pools: dict[tuple[int, bool], torch.cuda.MemPool] = {}
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._replays_on: dict[int, int] = {}
        self._taken: Counter[int] = Counter()
        self._failed = False

    @property
    def full(self) -> bool:
        device = torch.cuda.current_device()
        return self._taken[device] > MAX_SHARE * torch.cuda.get_device_properties(device).total_memory

    def forget(self) -> None:
        super().forget()
        self._pools.clear()
        self._taken.clear()

    def place(self) -> torch.device | None:
        if self._failed or not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
            return None
        device = torch.cuda.current_device()
        stream = torch.cuda.current_stream(device).cuda_stream
        return torch.device("cuda", device) if self._replays_on.setdefault(device, stream) == stream else None

    def record(self, function: Callable[[], Any], transient: bool) -> tuple[Any, Callable[[], None]]:
        before, device = torch.cuda.memory_allocated(), torch.cuda.current_device()
        try:
            recorded = self._capture(function, transient)
        except BaseException:
            # what failed may have left generators and pools in the middle of a capture: one that succeeds ends that
            self._failed = True
            self._pools.clear()
            with suppress(Exception):
                self._capture(lambda: torch.zeros(1, device="cuda"), transient)
            raise
        self._taken[device] += max(0, torch.cuda.memory_allocated() - before)
        return recorded

    def _capture(self, function: Callable[[], Any], transient: bool) -> tuple[Any, Callable[[], None]]:
        graph, device = torch.cuda.CUDAGraph(), torch.cuda.current_device()
        if (device, transient) not in self._pools:
            self._pools[device, transient] = torch.cuda.MemPool()
            self._streams.setdefault(device, torch.cuda.Stream(device))
        pool = self._pools[device, transient]
        torch.cuda.synchronize()
        with torch.cuda.stream(self._streams[device]), _uncached_casts():
            graph.capture_begin(pool=cast(Any, pool.id), capture_error_mode="thread_local")
            try:
                result = function()
            finally:
                graph.capture_end()
        return result, graph.replay


@contextmanager
def _uncached_casts() -> Iterator[None]:
    """Disable autocast's cache: a parameter that was cast before the capture would keep that value in all replays."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
