"""Capturing functions as CUDA graphs that share memory pools, and deciding which may be replayed without conflicts."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, cast

import torch

MAX_SHARE = 0.25
"""The fraction of a device's memory that the CUDA graphs of a model may take."""


class CapturedForward(Protocol):
    """A captured forward: its number in the order of capture, and whether its backward may still run."""

    number: int

    @property
    def awaits_backward(self) -> bool: ...


class GraphRecorder(ABC):
    """Captures functions, so that they can be replayed in the same memory, and tracks what a replay would overwrite."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._replayed: dict[int, CapturedForward] = {}

    @abstractmethod
    def capture(self, function: Callable[[], Any], transient: bool) -> tuple[Any, Callable[[], None]]:
        """Run a function once; return its result, and a function that replays it into the same memory.

        A `transient` result is copied right after each replay. Any other must stay valid until the backward has run,
        together with what the function has saved for it.
        """

    @abstractmethod
    def capture_device(self) -> torch.device | None:
        """Return the device on which functions can be captured now, None if there is none."""

    @property
    @abstractmethod
    def is_full(self) -> bool:
        """Whether captures have taken `MAX_SHARE` of the device's memory."""

    def next_number(self) -> int:
        return next(self._numbers)

    def clear(self) -> None:
        """Free all memory that no backward will read."""
        self._replayed.clear()

    def mark_replayed(self, captured: CapturedForward) -> None:
        """Record that a forward was replayed, whose backward may run."""
        self._replayed[captured.number] = captured

    def can_replay(self, captured: CapturedForward) -> bool:
        """Return whether replaying a forward now overwrites nothing that a backward will read.

        A forward writes to memory that it frees by its end, which later captures may have used for their results.
        """
        self._replayed = {number: other for number, other in self._replayed.items() if other.awaits_backward}
        return all(number < captured.number for number in self._replayed)


class CudaGraphRecorder(GraphRecorder):
    """Captures functions on GPUs, as CUDA graphs.

    On each device forwards and backwards have separate memory pools, so a backward never overwrites what a forward has
    saved. Graphs that share a pool must be replayed one after the other, so all are replayed on one stream.
    """

    def __init__(self) -> None:
        super().__init__()
        self._pools: dict[tuple[int, bool], torch.cuda.MemPool] = {}
        self._capture_streams: dict[int, torch.cuda.Stream] = {}
        self._replay_streams: dict[int, int] = {}
        self._bytes_taken: Counter[int] = Counter()
        self._failed = False

    @property
    def is_full(self) -> bool:
        device = torch.cuda.current_device()
        return self._bytes_taken[device] > MAX_SHARE * torch.cuda.get_device_properties(device).total_memory

    def clear(self) -> None:
        super().clear()
        self._pools.clear()
        self._bytes_taken.clear()

    def capture_device(self) -> torch.device | None:
        if self._failed or not torch.cuda.is_initialized() or torch.cuda.is_current_stream_capturing():
            return None
        device = torch.cuda.current_device()
        stream = torch.cuda.current_stream(device).cuda_stream
        return torch.device("cuda", device) if self._replay_streams.setdefault(device, stream) == stream else None

    def capture(self, function: Callable[[], Any], transient: bool) -> tuple[Any, Callable[[], None]]:
        before, device = torch.cuda.memory_allocated(), torch.cuda.current_device()
        try:
            captured = self._capture(function, transient)
        except BaseException:
            # a failed capture may leave generators and pools in the capturing state; a successful one resets them
            self._failed = True
            self._pools.clear()
            with suppress(Exception):
                self._capture(lambda: torch.zeros(1, device="cuda"), transient)
            raise
        self._bytes_taken[device] += max(0, torch.cuda.memory_allocated() - before)
        return captured

    def _capture(self, function: Callable[[], Any], transient: bool) -> tuple[Any, Callable[[], None]]:
        graph, device = torch.cuda.CUDAGraph(), torch.cuda.current_device()
        if (device, transient) not in self._pools:
            self._pools[device, transient] = torch.cuda.MemPool()
            self._capture_streams.setdefault(device, torch.cuda.Stream(device))
        pool = self._pools[device, transient]
        torch.cuda.synchronize()
        with torch.cuda.stream(self._capture_streams[device]), _disable_autocast_cache():
            graph.capture_begin(pool=cast(Any, pool.id), capture_error_mode="thread_local")
            try:
                result = function()
            finally:
                graph.capture_end()
        return result, graph.replay


@contextmanager
def _disable_autocast_cache() -> Iterator[None]:
    """Disable autocast's cache: replays would reuse the value of a parameter that was cast before the capture."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
