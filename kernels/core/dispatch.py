"""How an op's implementation is called: below autograd and autocast, and bypassing the dispatcher where possible."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from fastlora.compat import calls
from fastlora.compat import dispatch as compat_dispatch


def profiled(name: str, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Call a function under the operator's name in PyTorch's profiler, also if the dispatcher is bypassed."""
    if not calls.profiler_is_enabled():
        return function(*args, **named)
    with torch.profiler.record_function(f"fastlora::{name}"):
        return function(*args, **named)


def isolated(device: torch.device, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Call a function on a device without autograd and autocast, since ops have explicit dtypes.

    View tracking is off as well, so a result that was reshaped is not a view, and may be written to in place.
    """
    if device.type == "cuda" and several_gpus() and device.index != calls.current_device():
        with torch.cuda.device(device):
            return isolated(device, function, *args, **named)
    with calls.below_views():
        if device.type == "meta" or not torch.is_autocast_enabled(device.type):
            return function(*args, **named)
        torch.set_autocast_enabled(device.type, False)  # `torch.autocast` takes as long as a kernel launch
        try:
            return function(*args, **named)
        finally:
            torch.set_autocast_enabled(device.type, True)


def can_bypass_dispatcher(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Return whether the dispatcher, below autograd, would do nothing but call an operator's kernel.

    That is so for plain tensors without an active mode (fake tensors, tracing, counting) or torch.func transform.
    """
    if mode_is_active() or compat_dispatch.functorch_interpreter() is not None:
        return False
    plain, keys = _plain_keys(), calls.dispatch_keys
    for t in tensors:  # noqa: SIM110  (a generator is slower)
        if t is not None and keys(t).raw_repr() not in plain:
            return False
    return True


class _Thread(threading.local):
    ignored_modes = 0


_thread = _Thread()


@contextmanager
def ignoring_one_mode() -> Iterator[None]:
    """Bypass the dispatcher, in this thread, although the mode that is entered next is active: it only observes."""
    _thread.ignored_modes += 1
    try:
        yield
    finally:
        _thread.ignored_modes -= 1


def mode_is_active() -> bool:
    """Return whether a dispatch mode is active that may change what operators do."""
    return compat_dispatch.dispatch_modes() > _thread.ignored_modes


_constants: list[torch.Tensor] = []


def constant(t: torch.Tensor) -> torch.Tensor:
    """Register a tensor that is created once and never written to."""
    _constants.append(t)
    return t


def is_constant(t: torch.Tensor) -> bool:
    """Return whether a tensor was registered as a constant."""
    return any(each is t for each in _constants)


def is_last_backward() -> bool:
    """Return whether the running backward frees saved tensors, which it does without `retain_graph`."""
    return not calls.keeps_graph()


@cache
def several_gpus() -> bool:
    """Return whether there is more than one CUDA device."""
    return torch.cuda.device_count() > 1


@cache
def _plain_keys() -> frozenset[int]:
    """Return the dispatch keys of plain tensors on the CPU and on GPUs."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return frozenset(calls.dispatch_keys(torch.empty(0, device=device)).raw_repr() for device in devices)
