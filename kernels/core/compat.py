"""Every private API of PyTorch that the kernels rely on, by what it does; `tests/kernels/test_compat.py` probes each.

All are aliases rather than wrappers, as they run in every call of an op.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import DisableTorchFunctionSubclass as without_torch_function
from torch._C import _AutoDispatchBelowADInplaceOrView as below_views
from torch._C import _AutoDispatchBelowAutograd as below_autograd
from torch._C import _dispatch_keys as dispatch_keys
from torch._C import _len_torch_dispatch_stack as active_modes
from torch._C._autograd import _get_current_graph_task_keep_graph as keeps_graph
from torch._C._dynamo.guards import TensorGuards
from torch._C._functorch import peek_interpreter_stack as active_transform
from torch._prims_common import is_contiguous_or_false as is_contiguous_or_unknown
from torch.autograd import _profiler_enabled as profiler_is_enabled

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
"""The index of the current CUDA device; a build for CPUs has none."""
current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
"""The handle of the current stream of a CUDA device."""


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return `function.apply` for calls outside of torch.func's transforms, for which `apply` looks in Python."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


def layout_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Return a check whether other tensors, given one by one, are like these.

    Compared in C++ are types, dispatch keys (with autocast's), dtypes, devices, `requires_grad`, sizes and strides; and
    no two of them may be the same tensor.
    """
    check: Callable[..., bool] = TensorGuards(
        *tensors,
        dynamic_dims_sizes=[list(t.shape) for t in tensors],
        dynamic_dims_strides=[list(t.stride()) for t in tensors],
    ).check
    return check


__all__ = [
    "active_modes",
    "active_transform",
    "apply_of",
    "below_autograd",
    "below_views",
    "current_device",
    "current_stream",
    "dispatch_keys",
    "is_contiguous_or_unknown",
    "keeps_graph",
    "layout_check",
    "profiler_is_enabled",
    "without_torch_function",
]
