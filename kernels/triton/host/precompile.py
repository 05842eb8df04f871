"""Kernels that can be compiled before they are launched, many at a time.

Triton compiles a kernel in its first launch, and a first step has dozens of them, one behind the other: most of that
time Python waits for the assembler, and for the C compiler that builds what launches a kernel. Here an op runs on
tensors without memory, for which a GPU stands in; its launches are recorded instead of made, and then compiled side by
side. The launches that follow find their kernels in Triton's cache.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from fastlora.compat.calls import current_device
from fastlora.compat.launches import has_launch_hooks
from fastlora.kernels.core import shortcuts, trace
from fastlora.kernels.triton.host.kernel_cache import Launcher, specialization_key
from fastlora.kernels.triton.host.launch import IS_INTERPRETED

MOST_THREADS = 16
MOST_KNOWN = 4096
"""Kinds of launches of one kernel that are known again."""


class RecordedLaunch(NamedTuple):
    """A kernel with the arguments and options of one launch."""

    function: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]


class _Thread(threading.local):
    launches: list[RecordedLaunch] | None = None


_thread = _Thread()


class Kernel(JITFunction):
    """What `triton.jit` makes of a function, except that launches may be recorded, and that those like an earlier one
    find its kernel at once."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._known: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if _thread.launches is not None:
            _thread.launches.append(RecordedLaunch(self, args, options))
            return None
        if has_launch_hooks() or not shortcuts.use.kernels:
            trace.launched(None, args)
            return super().run(*args, grid=grid, warmup=warmup, **options)
        device = current_device()
        key = (device, specialization_key(self.params, args), *options.items())
        known = self._known.get(key)
        if known is None:
            kernel = super().run(*args, grid=grid, warmup=warmup, **options)
            rest = self.params[len(args) :]
            if all(param.is_constexpr for param in rest) and len(self._known) < MOST_KNOWN:
                self._known[key] = kernel, tuple(options.get(param.name, param.default) for param in rest)
            trace.launched(None, args)
            return kernel
        kernel, constants = known
        launch = Launcher(kernel, grid, device)
        launch(*args, *constants)
        if trace.is_recording():
            trace.launched(launch.again(), (*args, *constants))
        return kernel


class Interpreted(InterpretedFunction[Any]):
    """The same for Triton's interpreter."""

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        again = partial(super().run, grid=grid, warmup=warmup, **options)
        result = again(*args)
        trace.launched(trace.Launch(again), args)
        return result


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` for what is launched, and not called by other kernels."""
    return lambda function: (Interpreted if IS_INTERPRETED else Kernel)(function, **options)


@contextmanager
def recorded() -> Iterator[list[RecordedLaunch]]:
    """The launches that this thread would make, in order; none is made."""
    launches: list[RecordedLaunch] = []
    before, _thread.launches = _thread.launches, launches
    try:
        yield launches
    finally:
        _thread.launches = before


def is_recording() -> bool:
    """Whether this thread's launches are not made, but recorded."""
    return _thread.launches is not None


def compile_all(launches: Sequence[RecordedLaunch], device: torch.device) -> None:
    """Compiles and loads the kernels of these launches for a GPU, those that are not there yet.

    Raises:
        Exception: whatever the compiler raises; other kernels are compiled all the same.
    """
    with torch.cuda.device(device), ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1)) as threads:
        with triton.AsyncCompileMode(threads):
            found = [
                JITFunction.run(each.function, *each.args, grid=None, warmup=True, **each.options) for each in launches
            ]
        kernels = {id(made): made for each in found if (made := each.result() if hasattr(each, "result") else each)}
        list(threads.map(lambda made: _load(made, device), kernels.values()))


def _load(made: Any, device: torch.device) -> None:
    torch.cuda.set_device(device)  # a thread of its own has none
    made.run  # noqa: B018  (which builds what launches the kernel, and loads it)
