"""When a call has to pass a compiled module by: it is for a replica of the module, or inside a transform."""

from __future__ import annotations

import sys

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook


def calling_module(original: nn.Module) -> nn.Module:
    """Return the module whose `__call__` has called the caller of this function: `original`, or a replica of it.

    `nn.DataParallel` makes replicas by copying a module's `__dict__`, compiled-call slot included; what sits in the
    slot has to run the replica's own modules. PyTorch calls it without the module, so that is read off the frame of
    `nn.Module.__call__`.
    """
    frame = sys._getframe(2)
    module = frame.f_locals.get("self") if frame.f_code is nn.Module._wrapped_call_impl.__code__ else None
    return module if isinstance(module, nn.Module) else original


def transform() -> str | None:
    """Return the kind of transform that is active, for which fused ops have no rule; None if there is none."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is active"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None


def hooks_on_everything() -> bool:
    """Whether hooks are registered for all modules of the process, which TorchDynamo does not guard."""
    return _has_any_global_hook()


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run around a module's forward or backward."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or hooks_on_everything()
