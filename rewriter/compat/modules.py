"""`nn.Module`: its compiled-call slot, hooks, children and parameters; FSDP's state; transformers' configurations."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.module import _has_any_global_hook

__all__ = [
    "Dropout",
    "children_of",
    "compiled_call",
    "frees_parameters_after_forward",
    "global_hooks_exist",
    "hooks_of",
    "module_of_call",
    "parameters_of",
    "run_experts_one_by_one",
    "set_compiled_call",
    "uncompiled_call",
]

Hooks = dict[int, Any]

global_hooks_exist = _has_any_global_hook
"""Return whether hooks are registered for all modules of the process, such as by `register_module_forward_hook`."""

Dropout = _DropoutNd
"""The base class of `nn.Dropout` and its variants, whose probability is the attribute `p`."""

_CALL = nn.Module._wrapped_call_impl.__code__  # type: ignore[attr-defined]


def compiled_call(module: nn.Module) -> Any:
    """Return the function in a module's compiled-call slot, which `module(...)` calls instead of the module; None if
    the slot is empty.

    `nn.Module.compile` uses the same slot. It is not part of the state dict, and pickling and copying drop it.
    """
    return module._compiled_call_impl


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Put a function into a module's compiled-call slot; None to empty it."""
    module._compiled_call_impl = call  # type: ignore[assignment]


def uncompiled_call(module: nn.Module) -> Any:
    """Return the function that `module(...)` calls if the compiled-call slot is empty: hooks and forward."""
    return module._call_impl


def module_of_call(depth: int) -> nn.Module | None:
    """Return the module whose `__call__` is `depth` frames above the caller of this function, or None if that frame is
    of another function."""
    frame = sys._getframe(depth + 1)
    module = frame.f_locals.get("self") if frame.f_code is _CALL else None
    return module if isinstance(module, nn.Module) else None


def hooks_of(module: nn.Module) -> tuple[Hooks, Hooks, Hooks, Hooks]:
    """Return the hooks that run around a module's forward and backward."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the dictionary of a module's children."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the dictionary of a module's direct parameters."""
    return module._parameters


def frees_parameters_after_forward(module: Any) -> bool:
    """Return whether FSDP frees the parameters of an `FSDPModule` after its forward; True if that is not known.

    The state of the module has one group of parameters in torch 2.11, and a list of groups in 2.13.
    """
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return any(getattr(group, "_reshard_after_forward", True) for group in groups)


def run_experts_one_by_one(config: Any) -> None:
    """Set `experts_implementation` of a transformers configuration to a loop over experts, if it is grouped products.

    transformers 5 stores it in a private attribute.
    """
    if vars(config).get("_experts_implementation_internal") == "grouped_mm":
        vars(config)["_experts_implementation_internal"] = "eager"
