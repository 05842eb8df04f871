"""Calls of an op: the layouts of its tensors, the active profiler, device and stream, and running below autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C._dynamo.guards import TensorGuards
from torch._prims_common import is_contiguous_or_false
from torch._subclasses.fake_tensor import is_fake

__all__ = [
    "apply_of",
    "assert_async",
    "below_autograd",
    "below_views",
    "current_device",
    "current_stream",
    "dispatch_keys",
    "is_contiguous_or_false",
    "is_fake",
    "keeps_graph",
    "layout_check",
    "profiler_is_enabled",
]

dispatch_keys = torch._C._dispatch_keys
"""Return the dispatch keys of a tensor; their `raw_repr()` is the same for all plain tensors on one type of device."""

below_autograd = torch._C._AutoDispatchBelowAutograd
"""A context manager in which operators are dispatched below autograd."""

below_views = torch._C._AutoDispatchBelowADInplaceOrView
"""A context manager in which operators are dispatched below autograd and below the tracking of views."""

keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
"""Return whether the running backward keeps saved tensors, as with `retain_graph`."""

profiler_is_enabled = torch.autograd._profiler_enabled
"""Return whether PyTorch's profiler is recording."""

assert_async = torch._assert_async
"""Raise an error asynchronously on the device if a tensor of one element is zero."""

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
"""Return the index of the current CUDA device, or -1 in a CPU build."""

current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
"""Return the handle of the current stream of a CUDA device, or 0 in a CPU build."""


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return `function.apply` without its check for transforms of torch.func, which runs in Python."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def layout_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Return a function that checks whether other tensors, passed one by one, have the layouts of these.

    It compares, in C++, classes, dispatch keys (including autocast's), dtypes, devices, `requires_grad`, sizes and
    strides; no tensor may be passed twice.
    """
    sizes: Any = [list(t.shape) for t in tensors]
    strides: Any = [list(t.stride()) for t in tensors]
    check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check
