"""Copies between a GPU and the host on separate streams, concurrent with the computation."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch

_SIZE = 4096
"""Rows and columns of the matrices on which copies and matrix products are timed."""


class CopyStreams(Protocol):
    """Copies between a device and the host, concurrent with the computation."""

    def supports(self, device: torch.device) -> bool:
        """Return whether tensors of a device can be copied concurrently."""

    def bytes_per_flop(self, device: torch.device) -> float:
        """Return the bytes that are copied to the host in the time of a floating-point operation of a matrix product,
        0 until that is measured."""

    def to_host(self, memory: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """Start a copy to the host; return the copy, and an event at its end."""

    def to_device(self, host: torch.Tensor, copied: Any, device: torch.device) -> tuple[torch.Tensor, Any]:
        """Start a copy to the device after the event `copied`, the end of the copy to `host`; return the copy, and an
        event at its end."""

    def is_done(self, event: Any) -> bool: ...

    def wait(self, event: Any) -> None:
        """Make the computation wait for the end of a copy."""

    def hold_memory_until(self, event: Any) -> None:
        """Make the computation wait for the end of a copy before the device memory of the copy can be reused."""


class _Event(NamedTuple):
    """The end of a copy, and the current stream when it started, to which the copied device memory belongs."""

    event: torch.cuda.Event
    computing: torch.cuda.Stream


class CudaCopyStreams:
    """Copies on one stream for each direction and device."""

    def __init__(self) -> None:
        self._streams: dict[tuple[torch.device, bool], torch.cuda.Stream] = {}
        self._timed: dict[torch.device, list[torch.cuda.Event]] = {}

    def supports(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def bytes_per_flop(self, device: torch.device) -> float:
        if device not in self._timed:
            self._timed[device] = _time_copy_and_product(device)
        start, copied, multiplied = self._timed[device]
        if not multiplied.query():
            return 0.0
        copy, product = start.elapsed_time(copied), copied.elapsed_time(multiplied)
        return (_SIZE**2 * 2 / copy) / (2 * _SIZE**3 / product)

    def to_host(self, memory: torch.Tensor) -> tuple[torch.Tensor, Any]:
        host = torch.empty(memory.shape, dtype=memory.dtype, pin_memory=True)
        return host, self._copy(host, memory, memory.device, to_host=True)

    def to_device(self, host: torch.Tensor, copied: Any, device: torch.device) -> tuple[torch.Tensor, Any]:
        memory = torch.empty(host.shape, dtype=host.dtype, device=device)
        self._stream(device, to_host=False).wait_event(copied.event)
        return memory, self._copy(memory, host, device, to_host=False)

    def is_done(self, event: _Event) -> bool:
        return bool(event.event.query())

    def wait(self, event: _Event) -> None:
        torch.cuda.current_stream(event.computing.device).wait_event(event.event)

    def hold_memory_until(self, event: _Event) -> None:
        event.computing.wait_event(event.event)

    def _copy(self, target: torch.Tensor, source: torch.Tensor, device: torch.device, to_host: bool) -> _Event:
        stream, computing = self._stream(device, to_host), torch.cuda.current_stream(device)
        stream.wait_stream(computing)  # it computes `source`, or has just freed the memory of `target`
        torch.cuda.set_stream(stream)  # `with torch.cuda.stream` takes longer than launching the copy
        try:
            target.copy_(source, non_blocking=True)
        finally:
            torch.cuda.set_stream(computing)
        return _Event(stream.record_event(), computing)

    def _stream(self, device: torch.device, to_host: bool) -> torch.cuda.Stream:
        if (device, to_host) not in self._streams:
            self._streams[device, to_host] = torch.cuda.Stream(device)
        return self._streams[device, to_host]


def _time_copy_and_product(device: torch.device) -> list[torch.cuda.Event]:
    """Launch a copy to the host and a matrix product between three events, after an untimed one of each; do not
    wait."""
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    matrix = torch.zeros(_SIZE, _SIZE, dtype=dtype, device=device)
    host = torch.empty(matrix.shape, dtype=dtype, pin_memory=True)
    stream = torch.cuda.current_stream(device)
    with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.cuda.device(device):
        matrix.mm(matrix)
        host.copy_(matrix, non_blocking=True)
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        stream.record_event(events[0])
        host.copy_(matrix, non_blocking=True)
        stream.record_event(events[1])
        matrix.mm(matrix)
        stream.record_event(events[2])
    return events
