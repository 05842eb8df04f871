"""Activations that lie on the host between forward and backward.

A tensor that autograd saves is copied to pinned memory on a stream of its own while the forward goes on, and its memory
is free when the copy is through. The backward takes them in the opposite order, so that whenever one is read the copies
of those before it are on their way back already. What shares memory, as an activation and views of it, moves once.

Numerically nothing happens: what comes back has the bits, sizes and strides of what went.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch.autograd.graph import saved_tensors_hooks

SMALL = 1 << 20
"""Bytes of a tensor that is not worth a copy."""
MOST_OF = 16
"""A tensor that is less than this part of the memory that it is in leaves that alone."""
AHEAD = 192 << 20
"""Bytes that may be on their way back in any case, beside what is read next."""


class Lanes(Protocol):
    """Copies that run beside the computation."""

    def serve(self, device: torch.device) -> bool:
        """Whether there are any for a device."""

    def bytes_per_flop(self, device: torch.device) -> float:
        """What can be copied to the host in the time of a floating-point operation of a product; 0 as long as that is
        not known."""

    def leave(self, memory: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Starts a copy to the host; returns it, and what marks its end."""

    def come(self, host: torch.Tensor, left: Any, device: torch.device) -> tuple[torch.Tensor, Any]:
        """Starts a copy to the device, behind the end of the one that made `host`; returns it, and its end."""

    def is_over(self, end: Any) -> bool: ...

    def wait(self, end: Any) -> None:
        """Has the computation wait for the end of a copy."""

    def release(self, end: Any) -> None:
        """Has whoever is given the device's memory of a copy next wait for its end."""


class _End(NamedTuple):
    """What marks the end of a copy, and the stream that computed when it started, whose memory it reads or writes."""

    mark: torch.cuda.Event
    stream: torch.cuda.Stream


class CudaLanes:
    """Copies on streams of their own, one in each direction."""

    def __init__(self) -> None:
        self._streams: dict[tuple[torch.device, bool], torch.cuda.Stream] = {}
        self._trials: dict[torch.device, list[torch.cuda.Event]] = {}

    def serve(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def bytes_per_flop(self, device: torch.device) -> float:
        if device not in self._trials:
            self._trials[device] = _trial(device)
        begin, copied, multiplied = self._trials[device]
        if not multiplied.query():
            return 0.0
        copy, product = begin.elapsed_time(copied), copied.elapsed_time(multiplied)
        return (_TRIAL**2 * 2 / copy) / (2 * _TRIAL**3 / product)

    def leave(self, memory: torch.Tensor) -> tuple[torch.Tensor, Any]:
        host = torch.empty(memory.shape, dtype=memory.dtype, pin_memory=True)
        return host, self._copy(host, memory, memory.device, outward=True)

    def come(self, host: torch.Tensor, left: Any, device: torch.device) -> tuple[torch.Tensor, Any]:
        memory = torch.empty(host.shape, dtype=host.dtype, device=device)
        self._stream(device, outward=False).wait_event(left.mark)
        return memory, self._copy(memory, host, device, outward=False)

    def is_over(self, end: _End) -> bool:
        return bool(end.mark.query())

    def wait(self, end: _End) -> None:
        torch.cuda.current_stream(end.stream.device).wait_event(end.mark)

    def release(self, end: _End) -> None:
        end.stream.wait_event(end.mark)

    def _copy(self, to: torch.Tensor, of: torch.Tensor, device: torch.device, outward: bool) -> _End:
        stream, computing = self._stream(device, outward), torch.cuda.current_stream(device)
        stream.wait_stream(computing)  # which makes `of`, or has just freed the memory of `to`
        torch.cuda.set_stream(stream)  # as `with torch.cuda.stream` does, which takes longer than the copy's launch
        try:
            to.copy_(of, non_blocking=True)
        finally:
            torch.cuda.set_stream(computing)
        return _End(stream.record_event(), computing)

    def _stream(self, device: torch.device, outward: bool) -> torch.cuda.Stream:
        if (device, outward) not in self._streams:
            self._streams[device, outward] = torch.cuda.Stream(device)
        return self._streams[device, outward]


_TRIAL = 4096
"""Rows and columns of the matrices in trials."""


def _trial(device: torch.device) -> list[torch.cuda.Event]:
    """Marks around a copy to the host and around a product, each the second of its kind, for which nobody waits."""
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    matrix = torch.zeros(_TRIAL, _TRIAL, dtype=dtype, device=device)
    host = torch.empty(matrix.shape, dtype=dtype, pin_memory=True)
    stream = torch.cuda.current_stream(device)
    with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.cuda.device(device):
        matrix.mm(matrix)
        host.copy_(matrix, non_blocking=True)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        stream.record_event(marks[0])
        host.copy_(matrix, non_blocking=True)
        stream.record_event(marks[1])
        matrix.mm(matrix)
        stream.record_event(marks[2])
    return marks


@dataclass(eq=False)
class _Moved:
    """Memory that was moved: its copy on the host, and on the device as long as it is there.

    `original` is a tensor in that memory until the copy is through, which is not to change before that. `arrived` marks
    the end of a copy to the device for which nobody has waited yet.
    """

    lanes: Lanes
    host: torch.Tensor
    device: torch.device
    left: Any
    last: weakref.ref[_Moved] | None
    here: torch.Tensor | None
    original: torch.Tensor | None
    version: int
    room: int
    arrived: Any = None
    unread: int = 0
    wanted: bool = False
    spoiled: bool = False

    @property
    def before(self) -> _Moved | None:
        """What was moved before this, if it still is."""
        return None if self.last is None else self.last()

    def __del__(self) -> None:
        if self.arrived is not None:  # nobody has read it, and its memory is free now
            self.lanes.release(self.arrived)

    def check(self) -> None:
        self.spoiled |= self.original is not None and self.original._version != self.version


class _Stayed(NamedTuple):
    """A saved tensor that did not move, without the history that it may have: what saves its own result would otherwise
    keep itself alive. And its version, which autograd does not check for tensors with hooks."""

    tensor: torch.Tensor
    version: int


@dataclass(frozen=True)
class _Packed:
    """A saved tensor, as the part of moved memory that it is."""

    memory: _Moved
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class Mover:
    """Moves what is saved, and back.

    Args:
        lanes: what copies.
        note: is told why something was not moved.
    """

    lanes: Lanes
    note: Callable[[str], None]
    _leaving: deque[_Moved] = field(default_factory=deque)
    _lock: Any = field(default_factory=threading.RLock)
    _last: weakref.ref[_Moved] | None = None
    _full: bool = False

    def bytes_per_flop(self, device: torch.device) -> float:
        """As the lanes have it; 0 where there are none."""
        return self.lanes.bytes_per_flop(device) if self.lanes.serve(device) else 0.0

    def hooks(
        self, staying: Collection[int], seen: Callable[[int], None], moves: bool, room: int = 0
    ) -> saved_tensors_hooks:
        """Hooks for saved tensors, which tell `seen` the bytes of what is saved, and have it move if `moves`. Memory at
        the addresses `staying` stays and is not told of, nor are trifles. When it is read again, as much of what moved
        before it may come back as has `room`."""
        moved: dict[int, _Moved | None] = {}

        def pack(t: torch.Tensor) -> Any:
            at = t.untyped_storage().data_ptr() if _is_plain(t) and t.nbytes >= SMALL else None
            if at is None or at in staying:
                return _Stayed(t if t.grad_fn is None else t.detach(), t._version)
            memory = moved.get(at)
            if at not in moved or (memory is not None and memory.here is None):  # then others have that address now
                seen(t.untyped_storage().nbytes())
                memory = moved[at] = self._move(t, room) if moves else None
            if memory is None:
                return _Stayed(t.detach(), t._version)
            memory.unread += 1
            return _Packed(memory, t.dtype, t.shape, t.stride(), int(t.storage_offset()))

        return saved_tensors_hooks(pack, self._unpack)

    def settle(self, most: int | None = None) -> None:
        """Frees what has been copied; and waits for copies as long as more than `most` bytes are still to be."""
        with self._lock:
            while self._leaving:
                memory = self._leaving[0]
                if not self.lanes.is_over(memory.left):
                    if most is None or sum(each.host.nbytes for each in self._leaving) <= most:
                        return
                    self.lanes.release(memory.left)
                memory.check()
                memory.original = None
                if not memory.wanted:
                    memory.here = None
                self._leaving.popleft()

    def return_before(self, results: Iterable[Any], room: int) -> None:
        """Has as much of what moved so far come back as has `room` when the backward of `results` begins."""
        last = self._last
        if last is None or last() is None:
            return

        def fetch(_: torch.Tensor) -> None:
            with self._lock:
                self._fetch_ahead(last(), room)

        for t in results:
            if isinstance(t, torch.Tensor) and t.requires_grad:
                t.register_hook(fetch)
                return

    def _move(self, t: torch.Tensor, room: int) -> _Moved | None:
        storage = t.untyped_storage()
        if self._full or not self.lanes.serve(t.device) or t.nbytes * MOST_OF < storage.nbytes():
            return None
        here = torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage)
        try:
            host, left = self.lanes.leave(here)
        except RuntimeError as problem:  # of the host's memory, which may be less than asked for
            self._full = True
            self.note(f"memory_budget: the host has no more memory for activations: {problem}".partition("\n")[0])
            return None
        with self._lock:
            memory = _Moved(self.lanes, host, t.device, left, self._last, here, t.detach(), t._version, room)
            self._last = weakref.ref(memory)
            self._leaving.append(memory)
        return memory

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, _Stayed):
            _refuse(packed.tensor._version != packed.version)
            return packed.tensor
        with self._lock:
            memory: _Moved = packed.memory
            here = self._fetch(memory)
            if memory.arrived is not None:
                self.lanes.wait(memory.arrived)
                memory.arrived = None
            memory.check()
            _refuse(memory.spoiled)
            self._fetch_ahead(memory.before, max(AHEAD, memory.room))
            memory.unread -= 1
            if memory.unread <= 0:
                memory.here, memory.wanted = None, False
            self.settle()
        result = torch.empty(0, dtype=packed.dtype, device=memory.device)
        return result.set_(here.untyped_storage(), packed.offset, packed.shape, packed.stride)

    def _fetch(self, memory: _Moved) -> torch.Tensor:
        memory.wanted = True
        if memory.here is None:
            memory.here, memory.arrived = self.lanes.come(memory.host, memory.left, memory.device)
        return memory.here

    def _fetch_ahead(self, memory: _Moved | None, room: int) -> None:
        """Has `memory` and what moved before it come back, as much as has `room`."""
        while memory is not None and memory.host.nbytes <= room:
            if memory.unread > 0:
                self._fetch(memory)
                room -= memory.host.nbytes
            memory = memory.before


def _is_plain(t: torch.Tensor) -> bool:
    """Whether a tensor is no more than a part of its memory."""
    return type(t) is torch.Tensor and t.layout is torch.strided and not (t.is_complex() or t.is_neg())


def _refuse(changed: bool) -> None:
    if changed:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation, after a "
            "region with a memory_budget had saved it"
        )
