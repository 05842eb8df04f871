"""Launches like an earlier one, without what Triton does to find their kernel.

In every launch Triton binds the arguments to parameters, looks at each for what kernels are specialized in, prints that
into a key, and calls a chain of hooks before and after. That is most of what a launch costs on the host, and where
layers are short the host is what a step waits for. Here the same facts about the arguments make a tuple, by which an
earlier launch's kernel is found and called at once; a launch that is like none before goes Triton's way.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from triton.runtime.jit import KernelParam
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.compat.calls import current_stream
from fastlora.compat.launches import direct_launch, has_launch_hooks, launch
from fastlora.kernels.core.trace import STREAM, WRITERS, Launch

_INT32 = 1 << 31


def specialization_key(params: Sequence[KernelParam], args: Sequence[Any]) -> tuple[Hashable, ...]:
    """Return what positional arguments of a launch have in common with those that run the same kernel.

    That is what Triton specializes in, or more: the value of a constant; whether an integer is 1, a multiple of 16 or
    wider than 32 bits; a tensor's dtype and whether it starts at a multiple of 16 bytes; a descriptor's dtype and
    block.
    """
    found: list[Any] = []
    for param, arg in zip(params, args, strict=False):
        kind = type(arg)
        if param.is_constexpr or arg is None:
            found.append(arg)
        elif kind is int:
            found.append((arg == 1) + 2 * (arg % 16 == 0) + 4 * (not -_INT32 <= arg < _INT32) + 8 * (arg < 0))
        elif isinstance(arg, torch.Tensor):
            found.append((arg.dtype, arg.data_ptr() % 16 == 0))
        elif isinstance(arg, TensorDescriptor):
            found.append((arg.base.dtype, *arg.block_shape))
        else:
            found.append(kind)
    return tuple(found)


def descriptor(base: torch.Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    """Return a descriptor whose parts are known to be right; the constructor's checks take longer than a launch."""
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape, made.padding = base, shape, strides, block, "zero"
    return made


class Launcher:
    """Launches a compiled kernel on a device's current stream, called with all of its arguments in order."""

    def __init__(self, kernel: Any, grid: Sequence[int], device: int) -> None:
        x, y, z = (*grid, 1, 1)[:3]
        self._kernel, self._grid, self._device = kernel, (x, y, z), device

    def __call__(self, *args: Any) -> None:
        launch(self._kernel, self._grid, current_stream(self._device), *args)

    def again(self) -> Launch:
        """Return how to launch it again, past the kernel's launcher in Python where that adds nothing to the call."""
        function, before = direct_launch(self._kernel, self._grid, STREAM) or (self, ())
        return Launch(function, before, has_launch_hooks)


def _written(value: TensorDescriptor) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return descriptor, (value.base, list(value.shape), list(value.strides), list(value.block_shape))


WRITERS[TensorDescriptor] = _written
