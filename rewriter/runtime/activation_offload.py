"""Offloading: activations that are on the host between forward and backward.

A tensor that autograd saves is copied to pinned memory on a stream of its own while the forward goes on, and its device
memory is free once the copy is done. The backward reads them in the opposite order, so whenever one is read, those that
were offloaded before it are prefetched. Memory that several tensors share, as an activation and its views do, is copied
once.

Numerics do not change: what comes back has the bits, sizes and strides of what was saved.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import saved_tensors_hooks

from fastlora.runtime.copy_streams import CopyStreams

MIN_BYTES = 1 << 20
"""Smaller tensors are not offloaded."""
MIN_PART = 16
"""A tensor that is less than this part of its storage does not have the storage offloaded."""
PREFETCH_BYTES = 192 << 20
"""Bytes that may be prefetched in any case, beside what is read next."""


@dataclass(eq=False)
class _Offloaded:
    """A storage that was offloaded.

    Attributes:
        streams: what copies it.
        host: the copy on the host.
        copied: the event that marks the end of that copy.
        device: where it came from.
        on_device: the storage's bytes on the device, as long as they are there.
        original: a tensor in the storage until the copy is done; before that it must not be written to.
        version: of the original, when it was saved.
        room: bytes that may be prefetched when this is read.
        previous: what was offloaded before this.
        returned: the event that marks the end of a copy to the device, until something waits for it.
        unread: how many saved tensors of the storage the backward has yet to read.
        is_wanted: whether the backward has asked for it.
        was_written: whether the original was written to.
    """

    streams: CopyStreams
    host: torch.Tensor
    copied: Any
    device: torch.device
    on_device: torch.Tensor | None
    original: torch.Tensor | None
    version: int
    room: int
    previous: weakref.ref[_Offloaded] | None
    returned: Any = None
    unread: int = 0
    is_wanted: bool = False
    was_written: bool = False

    @property
    def before(self) -> _Offloaded | None:
        """Return what was offloaded before this, if it still is."""
        return None if self.previous is None else self.previous()

    def __del__(self) -> None:
        if self.returned is not None:  # it was prefetched and never read, and its memory is free now
            self.streams.hold_memory_until(self.returned)

    def check(self) -> None:
        self.was_written |= self.original is not None and self.original._version != self.version


class _Kept(NamedTuple):
    """A saved tensor that was not offloaded, and its version, which autograd does not check for tensors with hooks. It
    has no history: an operation that saves its own result would keep itself alive otherwise."""

    tensor: torch.Tensor
    version: int


@dataclass(frozen=True)
class _View:
    """A saved tensor as a view of an offloaded storage."""

    memory: _Offloaded
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class ActivationOffloader:
    """Offloads saved tensors, and copies them back for the backward.

    Args:
        streams: what copies.
        note: called with a sentence for the report if something cannot be offloaded.
    """

    streams: CopyStreams
    note: Callable[[str], None]
    _copying: deque[_Offloaded] = field(default_factory=deque)
    _lock: Any = field(default_factory=threading.RLock)
    _last: weakref.ref[_Offloaded] | None = None
    _host_is_full: bool = False

    def bytes_per_flop(self, device: torch.device) -> float:
        """Return the bytes that are copied in the time of a floating-point operation; 0 where nothing is copied."""
        return self.streams.bytes_per_flop(device) if self.streams.supports(device) else 0.0

    def hooks(
        self, keep: Collection[int], on_saved: Callable[[int], None], offload: bool, room: int = 0
    ) -> saved_tensors_hooks:
        """Return hooks for saved tensors.

        Args:
            keep: addresses of storages that are neither offloaded nor counted, as small tensors are.
            on_saved: called with the bytes of each storage that is saved.
            offload: whether to offload them.
            room: bytes that may be prefetched when one of them is read.
        """
        offloaded: dict[int, _Offloaded | None] = {}

        def pack(t: torch.Tensor) -> Any:
            address = t.untyped_storage().data_ptr() if _is_plain(t) and t.nbytes >= MIN_BYTES else None
            if address is None or address in keep:
                return _Kept(t if t.grad_fn is None else t.detach(), t._version)
            memory = offloaded.get(address)
            if address not in offloaded or (memory is not None and memory.on_device is None):  # of another storage now
                on_saved(t.untyped_storage().nbytes())
                memory = offloaded[address] = self._offload(t, room) if offload else None
            if memory is None:
                return _Kept(t.detach(), t._version)
            memory.unread += 1
            return _View(memory, t.dtype, t.shape, t.stride(), int(t.storage_offset()))

        return saved_tensors_hooks(pack, self._unpack)

    def free_copied(self, max_pending: int | None = None) -> None:
        """Free the device memory of what has been copied, and wait for copies until at most `max_pending` bytes are
        still to be copied."""
        with self._lock:
            while self._copying:
                memory = self._copying[0]
                if not self.streams.is_done(memory.copied):
                    if max_pending is None or sum(each.host.nbytes for each in self._copying) <= max_pending:
                        return
                    self.streams.hold_memory_until(memory.copied)
                memory.check()
                memory.original = None
                if not memory.is_wanted:
                    memory.on_device = None
                self._copying.popleft()

    def prefetch(self, results: Iterable[Any], room: int) -> None:
        """Have up to `room` bytes of what was offloaded so far copied back when the backward of `results` begins."""
        last = self._last
        if last is None or last() is None:
            return

        def fetch(_: torch.Tensor) -> None:
            with self._lock:
                self._fetch_from(last(), room)

        for t in results:
            if isinstance(t, torch.Tensor) and t.requires_grad:
                t.register_hook(fetch)
                return

    def _offload(self, t: torch.Tensor, room: int) -> _Offloaded | None:
        storage = t.untyped_storage()
        if self._host_is_full or not self.streams.supports(t.device) or t.nbytes * MIN_PART < storage.nbytes():
            return None
        bytes_on_device = torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage)
        try:
            host, copied = self.streams.to_host(bytes_on_device)
        except RuntimeError as problem:  # out of host memory
            self._host_is_full = True
            self.note(f"memory_budget: the host has no more memory for activations: {problem}".partition("\n")[0])
            return None
        with self._lock:
            memory = _Offloaded(
                self.streams, host, copied, t.device, bytes_on_device, t.detach(), t._version, room, self._last
            )
            self._last = weakref.ref(memory)
            self._copying.append(memory)
        return memory

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, _Kept):
            _refuse_if(packed.tensor._version != packed.version)
            return packed.tensor
        with self._lock:
            memory: _Offloaded = packed.memory
            on_device = self._fetch(memory)
            if memory.returned is not None:
                self.streams.wait(memory.returned)
                memory.returned = None
            memory.check()
            _refuse_if(memory.was_written)
            self._fetch_from(memory.before, max(PREFETCH_BYTES, memory.room))
            memory.unread -= 1
            if memory.unread <= 0:
                memory.on_device, memory.is_wanted = None, False
            self.free_copied()
        result = torch.empty(0, dtype=packed.dtype, device=memory.device)
        return result.set_(on_device.untyped_storage(), packed.offset, packed.shape, packed.stride)

    def _fetch(self, memory: _Offloaded) -> torch.Tensor:
        memory.is_wanted = True
        if memory.on_device is None:
            memory.on_device, memory.returned = self.streams.to_device(memory.host, memory.copied, memory.device)
        return memory.on_device

    def _fetch_from(self, memory: _Offloaded | None, room: int) -> None:
        """Copy back `memory` and what was offloaded before it, up to `room` bytes."""
        while memory is not None and memory.host.nbytes <= room:
            if memory.unread > 0:
                self._fetch(memory)
                room -= memory.host.nbytes
            memory = memory.before


def _is_plain(t: torch.Tensor) -> bool:
    """Whether a tensor is no more than a part of its storage."""
    return type(t) is torch.Tensor and t.layout is torch.strided and not (t.is_complex() or t.is_neg())


def _refuse_if(was_written: bool) -> None:
    if was_written:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation, after a "
            "region with a memory_budget had saved it"
        )
