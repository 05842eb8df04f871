"""The calls of an op: what its tensors are, what is active around it, and how to run below autograd."""

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
"""Return the dispatch keys of a tensor; `raw_repr()` of two plain tensors on one kind of device is the same number."""

below_autograd = torch._C._AutoDispatchBelowAutograd
"""A context manager within which operators are dispatched past autograd."""

below_views = torch._C._AutoDispatchBelowADInplaceOrView
"""A context manager within which operators are dispatched past autograd, and past what notes whose view a result is."""

keeps_graph = torch._C._autograd._get_current_graph_task_keep_graph
"""Return whether the running backward was called with `retain_graph`, or another way that keeps what was saved."""

profiler_is_enabled = torch.autograd._profiler_enabled
"""Return whether PyTorch's profiler is recording."""

assert_async = torch._assert_async
"""Raise an error on the device, without waiting for it, if a tensor of one element is zero."""

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
"""Return the index of the current CUDA device; -1 in a build for CPUs."""

current_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
"""Return the handle of the current stream of a CUDA device; 0 in a build for CPUs."""


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Return `function.apply` for calls outside of transforms of torch.func, after which `apply` looks in Python."""
    apply: Callable[..., Any] = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    return apply


def layout_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool]:
    """Return a check whether other tensors, given one by one, are of the same layouts as these.

    Compared in C++ are classes, dispatch keys (autocast's included), dtypes, devices, `requires_grad`, sizes and
    strides; and no two of them may be the same tensor.
    """
    sizes: Any = [list(t.shape) for t in tensors]
    strides: Any = [list(t.stride()) for t in tensors]
    check: Callable[..., bool] = TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check
    return check
