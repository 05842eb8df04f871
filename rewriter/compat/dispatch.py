"""PyTorch's dispatcher: modes, function overrides, tensor subclasses, operators and their schemas, pytrees."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

__all__ = [
    "HigherOrderOperator",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "disable_function_overrides",
    "disable_modes",
    "dispatch_modes",
    "enable_function_overrides",
    "forbid_data_pointer",
    "function_modes_change_results",
    "function_overrides_are_enabled",
    "functorch_interpreter",
    "grouped_mm",
    "is_wrapper_subclass",
    "make_wrapper_subclass",
    "schema_of",
    "tree_leaves",
    "tree_map",
    "tree_map_only",
]

dispatch_modes = torch._C._len_torch_dispatch_stack
"""Return the number of active `TorchDispatchMode`s."""

functorch_interpreter = torch._C._functorch.peek_interpreter_stack
"""Return the innermost active transform of torch.func, or None."""

function_overrides_are_enabled = torch._C._is_torch_function_enabled
"""Return whether `__torch_function__` of tensor subclasses is called."""

disable_function_overrides = torch._C.DisableTorchFunctionSubclass
"""A context manager in which `__torch_function__` of tensor subclasses is not called."""

enable_function_overrides = torch._C._EnableTorchFunction
"""A context manager that undoes `disable_function_overrides`."""

disable_modes = _disable_current_modes
"""A context manager in which no `TorchDispatchMode` is active."""

make_wrapper_subclass = torch.Tensor._make_wrapper_subclass
"""Create a tensor of a subclass that has sizes, strides and a dtype, but no memory."""

forbid_data_pointer = torch._C._set_throw_on_mutable_data_ptr
"""Make C++ code raise an error if it reads a tensor's mutable data pointer."""

is_wrapper_subclass = is_traceable_wrapper_subclass
"""Return whether a tensor is of a wrapper subclass, whose inner tensors `__tensor_flatten__` names."""

grouped_mm = torch._grouped_mm
"""The name of `F.grouped_mm` in torch 2.11, which models still call in later versions."""


def function_modes_change_results() -> bool:
    """Return whether a `TorchFunctionMode` is active other than that of `torch.set_default_device`."""
    return any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())


def schema_of(op: Any) -> torch.FunctionSchema:
    """Return the schema of an operator, including which arguments it writes to and which ones its results alias."""
    schema: torch.FunctionSchema = op._schema
    return schema
