"""Counts the kernels that the Triton forms launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch


@contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the kernels launched, in order."""
    from triton.runtime.jit import KernelInterface

    from fastlora.kernels.core.call_site import without

    launched: list[str] = []
    start = KernelInterface.__getitem__

    def spy(kernel: Any, grid: Any) -> Callable[..., Any]:
        launched.append(kernel.fn.__name__)
        return start(kernel, grid)

    with without("traces"), patch.object(KernelInterface, "__getitem__", spy):
        yield launched
