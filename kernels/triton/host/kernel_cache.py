"""A faster lookup of compiled kernels than Triton's own.

In every launch Triton binds the arguments, computes their specialization, formats that into a string key, and calls
hooks before and after: most of a launch's overhead on the host, which dominates for small layers. Here the same
properties of the arguments form a tuple, under which the kernel of an earlier launch is found and launched directly. A
launch with a new key goes through Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from triton.runtime.jit import KernelParam
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.compat.calls import current_stream
from fastlora.compat.launches import direct_launch, has_launch_hooks, launch
from fastlora.kernels.core.trace import RECONSTRUCTORS, STREAM, Launch

_INT32 = 1 << 31


def specialization_key(params: Sequence[KernelParam], args: Sequence[Any]) -> tuple[Hashable, ...]:
    """Return a key of a launch's positional arguments; launches with equal keys run the same kernel.

    It is at least as fine as Triton's specialization: the value of a constexpr; whether an integer is 1, a multiple of
    16 or wider than 32 bits; a tensor's dtype and whether it is aligned to 16 bytes; a descriptor's dtype and block.
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
    """Return a `TensorDescriptor` without its constructor's checks, which take longer than a launch."""
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape, made.padding = base, shape, strides, block, "zero"
    return made


class Launcher:
    """Launches a compiled kernel on a device's current stream; takes all of the kernel's arguments in order."""

    def __init__(self, kernel: Any, grid: Sequence[int], device: int) -> None:
        x, y, z = (*grid, 1, 1)[:3]
        self._kernel, self._grid, self._device = kernel, (x, y, z), device

    def __call__(self, *args: Any) -> None:
        launch(self._kernel, self._grid, current_stream(self._device), *args)

    def again(self) -> Launch:
        """Return a recorded launch, which bypasses the kernel's launcher in Python where possible."""
        function, before = direct_launch(self._kernel, self._grid, STREAM) or (self, ())
        return Launch(function, before, has_launch_hooks)


def _reconstruct(value: TensorDescriptor) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return descriptor, (value.base, list(value.shape), list(value.strides), list(value.block_shape))


RECONSTRUCTORS[TensorDescriptor] = _reconstruct
