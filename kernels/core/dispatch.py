"""How an op's forms are called: past autograd and autocast, and past the dispatcher where nobody listens to it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch


def run(name: str, form: Callable[..., Any], anchor: torch.Tensor, arguments: dict[str, Any]) -> Any:
    """Runs a form unseen by autograd, on the tensors' GPU, and without autocast, as ops state their dtypes. PyTorch's
    profiler sees it under its operator's name, which it would not where the dispatcher is passed over."""
    if torch.autograd._profiler_enabled():
        with torch.profiler.record_function(f"fastlora::{name}"):
            return _run(form, anchor, arguments)
    return _run(form, anchor, arguments)


def _run(form: Callable[..., Any], anchor: torch.Tensor, arguments: dict[str, Any]) -> Any:
    """Below what tracks views as well: a result that a form has reshaped is nobody's view, so it may be written to."""
    device = anchor.device
    with torch._C._AutoDispatchBelowADInplaceOrView():
        if anchor.is_cuda and _several_gpus() and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return _without_autocast(device.type, form, arguments)
        return form(**arguments) if anchor.is_meta else _without_autocast(device.type, form, arguments)


def _without_autocast(device: str, form: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """As within `torch.autocast(device, enabled=False)`, which takes as long as the launch of some kernels."""
    if not torch.is_autocast_enabled(device):
        return form(**arguments)
    torch.set_autocast_enabled(device, False)
    try:
        return form(**arguments)
    finally:
        torch.set_autocast_enabled(device, True)


def unheard(tensors: Iterable[torch.Tensor | None]) -> bool:
    """Whether the dispatcher would do nothing, below autograd, but call the op's kernel, which then can be called as it
    is: the tensors are plain ones in memory, no mode is active (fake tensors, tracing, counting), and no transform of
    torch.func. A call through the dispatcher takes microseconds."""
    if mode_is_active() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    plain, keys = _plain_keys(), torch._C._dispatch_keys
    for t in tensors:  # noqa: SIM110  (a generator takes longer)
        if t is not None and keys(t).raw_repr() not in plain:
            return False
    return True


class _Thread(threading.local):
    unlistened = 0


_thread = _Thread()


@contextmanager
def unlistened() -> Iterator[None]:
    """In this thread, one mode that is entered next only looks on: operators are called as if it was not there."""
    _thread.unlistened += 1
    try:
        yield
    finally:
        _thread.unlistened -= 1


def mode_is_active() -> bool:
    """Whether a mode sees what the dispatcher is asked to do, and may do something else."""
    return torch._C._len_torch_dispatch_stack() > _thread.unlistened


_constants: list[torch.Tensor] = []


def constant(t: torch.Tensor) -> torch.Tensor:
    """Registers a tensor that is made once, and never changes."""
    _constants.append(t)
    return t


def is_constant(t: torch.Tensor) -> bool:
    return any(each is t for each in _constants)


def is_last_backward() -> bool:
    """Whether autograd, in the backward that is running, frees what a node saved as soon as the node has run: without
    `retain_graph` nobody else reads it."""
    return not torch._C._autograd._get_current_graph_task_keep_graph()


@cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


@cache
def _plain_keys() -> frozenset[int]:
    """The dispatch keys of plain tensors on the CPU and on GPUs."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return frozenset(torch._C._dispatch_keys(torch.empty(0, device=device)).raw_repr() for device in devices)
