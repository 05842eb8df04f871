"""Activation offloading: saved tensors are moved to the host between forward and backward.

A tensor that autograd saves is copied to pinned memory on a separate stream while the forward continues, and its device
memory is freed once the copy is done. The backward reads saved tensors in the opposite order, so when one is read,
those that were offloaded before it are prefetched. A storage that several tensors share, such as an activation and its
views, is copied once.

Numerics do not change: unpacked tensors have the same bits, sizes and strides as the saved ones.
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
MIN_STORAGE_SHARE = 16
"""The storage of a tensor is offloaded only if the tensor takes at least 1 / MIN_STORAGE_SHARE of it."""
PREFETCH_BYTES = 192 << 20
"""Bytes that may always be prefetched, beside what is read next."""


@dataclass(eq=False)
class _OffloadedStorage:
    """A storage that was offloaded.

    Attributes:
        streams: copies it.
        host: the copy on the host.
        copied: the event at the end of the copy to the host.
        device: the device of the storage.
        on_device: the bytes of the storage on the device, as long as they are there.
        original: a tensor in the storage until the copy is done; it must not be written to before.
        version: the version of `original` when it was saved.
        headroom: bytes that may be prefetched when this is read.
        previous: the storage that was offloaded before this one.
        prefetched: the event at the end of a copy to the device, until something waits for it.
        unread: how many saved tensors in the storage the backward has yet to read.
        is_needed: whether a copy to the device was started, or the bytes are still needed there.
        was_written: whether the original was written to.
    """

    streams: CopyStreams
    host: torch.Tensor
    copied: Any
    device: torch.device
    on_device: torch.Tensor | None
    original: torch.Tensor | None
    version: int
    headroom: int
    previous: weakref.ref[_OffloadedStorage] | None
    prefetched: Any = None
    unread: int = 0
    is_needed: bool = False
    was_written: bool = False

    @property
    def before(self) -> _OffloadedStorage | None:
        """The storage that was offloaded before this one, if it is still alive."""
        return None if self.previous is None else self.previous()

    def __del__(self) -> None:
        if self.prefetched is not None:  # it was never read, and its device memory is freed now
            self.streams.hold_memory_until(self.prefetched)

    def check_version(self) -> None:
        self.was_written |= self.original is not None and self.original._version != self.version


class _Kept(NamedTuple):
    """A saved tensor that stays on the device, and its version, which autograd does not check if there are hooks. It
    is detached: an operation that saves its own result would otherwise keep itself alive."""

    tensor: torch.Tensor
    version: int


@dataclass(frozen=True)
class _View:
    """A saved tensor as a view of an offloaded storage."""

    storage: _OffloadedStorage
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class ActivationOffloader:
    """Offloads saved tensors, and copies them back for the backward.

    Args:
        streams: copies between device and host.
        note: called with a sentence for the report if something cannot be offloaded.
    """

    streams: CopyStreams
    note: Callable[[str], None]
    _copying: deque[_OffloadedStorage] = field(default_factory=deque)
    _lock: Any = field(default_factory=threading.RLock)
    _last: weakref.ref[_OffloadedStorage] | None = None
    _host_is_full: bool = False

    def bytes_per_flop(self, device: torch.device) -> float:
        """Return the bytes that are copied in the time of a floating-point operation, 0 if nothing can be copied."""
        return self.streams.bytes_per_flop(device) if self.streams.supports(device) else 0.0

    def hooks(
        self, keep: Collection[int], on_saved: Callable[[int], None], offload: bool, headroom: int = 0
    ) -> saved_tensors_hooks:
        """Return hooks for saved tensors.

        Args:
            keep: addresses of storages that, like small tensors, are neither offloaded nor counted.
            on_saved: called with the bytes of each storage that is saved.
            offload: whether to offload the storages.
            headroom: bytes that may be prefetched when one of them is read.
        """
        offloaded: dict[int, _OffloadedStorage | None] = {}

        def pack(t: torch.Tensor) -> Any:
            address = t.untyped_storage().data_ptr() if _is_plain(t) and t.nbytes >= MIN_BYTES else None
            if address is None or address in keep:
                return _Kept(t if t.grad_fn is None else t.detach(), t._version)
            storage = offloaded.get(address)
            is_reused = storage is not None and storage.on_device is None  # another storage has this address now
            if address not in offloaded or is_reused:
                on_saved(t.untyped_storage().nbytes())
                storage = offloaded[address] = self._offload(t, headroom) if offload else None
            if storage is None:
                return _Kept(t.detach(), t._version)
            storage.unread += 1
            return _View(storage, t.dtype, t.shape, t.stride(), int(t.storage_offset()))

        return saved_tensors_hooks(pack, self._unpack)

    def free_copied(self, max_pending: int | None = None) -> None:
        """Free the device memory of copied storages, and wait for copies until at most `max_pending` bytes are
        pending."""
        with self._lock:
            while self._copying:
                storage = self._copying[0]
                if not self.streams.is_done(storage.copied):
                    if max_pending is None or sum(each.host.nbytes for each in self._copying) <= max_pending:
                        return
                    self.streams.hold_memory_until(storage.copied)
                storage.check_version()
                storage.original = None
                if not storage.is_needed:
                    storage.on_device = None
                self._copying.popleft()

    def prefetch(self, results: Iterable[Any], headroom: int) -> None:
        """Prefetch up to `headroom` bytes of what was offloaded so far when the backward of `results` begins."""
        last = self._last
        if last is None or last() is None:
            return

        def fetch(_: torch.Tensor) -> None:
            with self._lock:
                self._fetch_from(last(), headroom)

        for t in results:
            if isinstance(t, torch.Tensor) and t.requires_grad:
                t.register_hook(fetch)
                return

    def _offload(self, t: torch.Tensor, headroom: int) -> _OffloadedStorage | None:
        storage = t.untyped_storage()
        if self._host_is_full or not self.streams.supports(t.device) or t.nbytes * MIN_STORAGE_SHARE < storage.nbytes():
            return None
        bytes_on_device = torch.empty(0, dtype=torch.uint8, device=t.device).set_(storage)
        try:
            host, copied = self.streams.to_host(bytes_on_device)
        except RuntimeError as problem:  # out of host memory
            self._host_is_full = True
            self.note(f"memory_budget: the host has no more memory for activations: {problem}".partition("\n")[0])
            return None
        with self._lock:
            offloaded = _OffloadedStorage(
                self.streams, host, copied, t.device, bytes_on_device, t.detach(), t._version, headroom, self._last
            )
            self._last = weakref.ref(offloaded)
            self._copying.append(offloaded)
        return offloaded

    def _unpack(self, packed: Any) -> torch.Tensor:
        if isinstance(packed, _Kept):
            _raise_if(packed.tensor._version != packed.version)
            return packed.tensor
        with self._lock:
            storage: _OffloadedStorage = packed.storage
            on_device = self._fetch(storage)
            if storage.prefetched is not None:
                self.streams.wait(storage.prefetched)
                storage.prefetched = None
            storage.check_version()
            _raise_if(storage.was_written)
            self._fetch_from(storage.before, max(PREFETCH_BYTES, storage.headroom))
            storage.unread -= 1
            if storage.unread <= 0:
                storage.on_device, storage.is_needed = None, False
            self.free_copied()
        result = torch.empty(0, dtype=packed.dtype, device=storage.device)
        return result.set_(on_device.untyped_storage(), packed.offset, packed.shape, packed.stride)

    def _fetch(self, storage: _OffloadedStorage) -> torch.Tensor:
        storage.is_needed = True
        if storage.on_device is None:
            storage.on_device, storage.prefetched = self.streams.to_device(storage.host, storage.copied, storage.device)
        return storage.on_device

    def _fetch_from(self, storage: _OffloadedStorage | None, headroom: int) -> None:
        """Copy back `storage` and those that were offloaded before it, up to `headroom` bytes."""
        while storage is not None and storage.host.nbytes <= headroom:
            if storage.unread > 0:
                self._fetch(storage)
                headroom -= storage.host.nbytes
            storage = storage.before


def _is_plain(t: torch.Tensor) -> bool:
    """Return whether a tensor is fully described by its storage, offset, sizes and strides."""
    return type(t) is torch.Tensor and t.layout is torch.strided and not (t.is_complex() or t.is_neg())


def _raise_if(was_written: bool) -> None:
    if was_written:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation, after a "
            "region with a memory_budget had saved it"
        )
