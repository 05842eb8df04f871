"""Recording what functions do on a GPU into CUDA graphs, and what has to be known of the memory that graphs share."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, cast

import torch

MAX_SHARE = 0.25
"""Of a device's memory, in all recordings of a model."""


class Recorded(Protocol):
    """A recorded forward: its place in the order of recording, and whether its backward is still to come."""

    number: int

    @property
    def busy(self) -> bool: ...


class Recorder(ABC):
    """Records functions so that they can be done again in the same memory, and knows what that overwrites."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._begun: dict[int, Recorded] = {}

    @abstractmethod
    def record(self, function: Callable[[], Any], transient: bool) -> tuple[Any, Callable[[], None]]:
        """Runs a function once; returns its result, which stays in its place, and what does the same again there.

        A `transient` result is copied as soon as it is there; any other is kept, with what the function saved for its
        backward, until nobody wants it.
        """

    @abstractmethod
    def place(self) -> torch.device | None:
        """The device that can be recorded now."""

    @property
    @abstractmethod
    def full(self) -> bool:
        """Whether recordings have taken as much memory as they may."""

    def number(self) -> int:
        return next(self._numbers)

    def forget(self) -> None:
        """Lets go of all memory that no forward's backward wants any more."""
        self._begun.clear()

    def begin(self, recording: Recorded) -> None:
        """Tells that a forward was replayed whose backward may come."""
        self._begun[recording.number] = recording

    def is_free(self, recording: Recorded) -> bool:
        """Whether replaying its forward now overwrites nothing that is wanted.

        What a forward has freed by its end, those that were recorded after it may keep their results in.
        """
        self._begun = {number: other for number, other in self._begun.items() if other.busy}
        return all(number < recording.number for number in self._begun)


class CudaGraphs(Recorder):
    """Records on GPUs, into CUDA graphs.

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
    """Without autocast's cache, as a parameter that was cast before would stay in a recording as it was then."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
