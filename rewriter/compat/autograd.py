"""Autograd: the running backward, hooks on saved tensors, forward-mode levels."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = [
    "NO_BACKWARD",
    "foreach_copy_",
    "forward_mode_is_active",
    "graph_task_id",
    "saved_tensors_hooks",
    "saved_tensors_hooks_disabled",
    "storage_id",
]

graph_task_id = torch._C._current_graph_task_id
"""Return the id of the backward that runs in this thread, or `NO_BACKWARD` if none does."""

NO_BACKWARD = -1

saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks
"""Return the innermost pair of hooks on saved tensors, or None. Call it with True, to include hooks while TorchDynamo
traces."""

saved_tensors_hooks_disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message
"""Return the error message of `torch.autograd.graph.disable_saved_tensors_hooks`, or None if hooks are allowed."""

foreach_copy_ = torch._foreach_copy_
"""Copy a list of tensors into another with few launches; optimizers use it."""


def forward_mode_is_active() -> bool:
    """Return whether forward-mode differentiation is active."""
    return forward_ad._current_level >= 0


def storage_id(t: torch.Tensor) -> int:
    """Return the address of the C++ object of a tensor's storage, which fake tensors have as well."""
    return t.untyped_storage()._cdata
