"""Kernels that can be compiled ahead of their first launch, in parallel.

Triton compiles a kernel in its first launch, so a first training step compiles dozens one after another, mostly waiting
for the assembler and for the C compiler that builds the launchers. Here ops run on meta tensors, their launches are
recorded instead of made, and the recorded kernels are compiled in parallel. Later launches find them in Triton's cache.
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

MAX_THREADS = 16
MAX_CACHED = 4096
"""Specializations of one kernel that are cached."""


class RecordedLaunch(NamedTuple):
    """A kernel with the arguments and options of one launch."""

    function: JITFunction
    args: tuple[Any, ...]
    options: dict[str, Any]


class _Thread(threading.local):
    launches: list[RecordedLaunch] | None = None


_thread = _Thread()


class Kernel(JITFunction):
    """A `JITFunction` whose launches may be recorded instead of made, and which caches compiled kernels by
    `specialization_key`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._cached: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if _thread.launches is not None:
            _thread.launches.append(RecordedLaunch(self, args, options))
            return None
        if has_launch_hooks() or not shortcuts.use.kernels:
            trace.record_launch(None, args)
            return super().run(*args, grid=grid, warmup=warmup, **options)
        device = current_device()
        key = (device, specialization_key(self.params, args), *options.items())
        cached = self._cached.get(key)
        if cached is None:
            kernel = super().run(*args, grid=grid, warmup=warmup, **options)
            rest = self.params[len(args) :]
            if all(param.is_constexpr for param in rest) and len(self._cached) < MAX_CACHED:
                self._cached[key] = kernel, tuple(options.get(param.name, param.default) for param in rest)
            trace.record_launch(None, args)
            return kernel
        kernel, constants = cached
        launch = Launcher(kernel, grid, device)
        launch(*args, *constants)
        if trace.is_recording():
            trace.record_launch(launch.again(), (*args, *constants))
        return kernel


class Interpreted(InterpretedFunction[Any]):
    """A kernel that runs in Triton's interpreter."""

    def run(self, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        launch = partial(super().run, grid=grid, warmup=warmup, **options)
        result = launch(*args)
        trace.record_launch(trace.Launch(launch), args)
        return result


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Decorate a kernel that the host launches; functions that kernels call take `triton.jit`."""
    return lambda function: (Interpreted if IS_INTERPRETED else Kernel)(function, **options)


@contextmanager
def recorded() -> Iterator[list[RecordedLaunch]]:
    """Record this thread's launches, in order, instead of making them."""
    launches: list[RecordedLaunch] = []
    before, _thread.launches = _thread.launches, launches
    try:
        yield launches
    finally:
        _thread.launches = before


def is_recording() -> bool:
    """Return whether this thread's launches are recorded instead of made."""
    return _thread.launches is not None


def compile_all(launches: Sequence[RecordedLaunch], device: torch.device) -> None:
    """Compile and load the kernels of these launches for a GPU, unless they are already.

    Raises:
        Exception: what the compiler raises; the other kernels are compiled nevertheless.
    """
    with torch.cuda.device(device), ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1)) as threads:
        with triton.AsyncCompileMode(threads):
            found = [
                JITFunction.run(each.function, *each.args, grid=None, warmup=True, **each.options) for each in launches
            ]
        kernels = {id(made): made for each in found if (made := each.result() if hasattr(each, "result") else each)}
        list(threads.map(lambda made: _load(made, device), kernels.values()))


def _load(kernel: Any, device: torch.device) -> None:
    torch.cuda.set_device(device)  # the current device is per thread
    kernel.run  # noqa: B018  (the property builds the launcher and loads the kernel)
