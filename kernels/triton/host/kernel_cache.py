"""Launches that are like an earlier one, without what Triton does to find their kernel.

In every launch Triton binds the arguments to parameters, looks at each for what kernels are specialised in, prints that
into a key, and has a chain of hooks called before and after. That is most of what a launch costs on the host, and where
layers are short the host is what a step waits for. Here the same facts about the arguments make a tuple, by which an
earlier launch's kernel is found and called at once; a launch that is like none before goes Triton's way.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from triton import knobs
from triton.runtime.jit import KernelParam
from triton.tools.tensor_descriptor import TensorDescriptor

_INTEGERS = 1 << 31


def likeness(params: Sequence[KernelParam], args: Sequence[Any]) -> tuple[Hashable, ...]:
    """What positional arguments of a launch have in common with those that run the same kernel: what Triton specialises
    in, or more. That is the value of a constant; whether an integer is 1, a multiple of 16 or wider than 32 bits; a
    tensor's dtype and whether it starts at a multiple of 16 bytes; a descriptor's dtype and block."""
    found: list[Any] = []
    for param, arg in zip(params, args, strict=False):
        kind = type(arg)
        if param.is_constexpr or arg is None:
            found.append(arg)
        elif kind is int:
            found.append((arg == 1) + 2 * (arg % 16 == 0) + 4 * (not -_INTEGERS <= arg < _INTEGERS) + 8 * (arg < 0))
        elif isinstance(arg, torch.Tensor):
            found.append((arg.dtype, arg.data_ptr() % 16 == 0))
        elif isinstance(arg, TensorDescriptor):
            found.append((arg.base.dtype, *arg.block_shape))
        else:
            found.append(kind)
    return tuple(found)


def heard() -> bool:
    """Whether somebody listens to launches, such as a profiler."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


def descriptor(base: torch.Tensor, shape: list[int], strides: list[int], block: list[int]) -> TensorDescriptor:
    """A descriptor whose parts are known to be right; the constructor checks them, for longer than a launch takes."""
    made = object.__new__(TensorDescriptor)
    made.base, made.shape, made.strides, made.block_shape, made.padding = base, shape, strides, block, "zero"
    return made


def launch(kernel: Any, grid: Sequence[int], device: int, args: Sequence[Any]) -> None:
    """Launches a compiled kernel on the device's current stream, with all of its arguments in order."""
    x, y, z = (*grid, 1, 1)[:3]
    stream = torch._C._cuda_getCurrentRawStream(device)
    kernel.run(x, y, z, stream, kernel.function, kernel.packed_metadata, None, None, None, *args)
