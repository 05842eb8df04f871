"""When a call has to pass a compiled module by, or to be traced with care: replicas, transforms, hooks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils.hooks import RemovableHandle


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


def mode() -> bool:
    """Whether a mode would see a head's product, and may do something else. A default device is none."""
    if torch._C._len_torch_dispatch_stack():
        return True
    return any(type(each) is not DeviceContext for each in _get_current_function_mode_stack())


def hooks_on_everything() -> bool:
    """Whether hooks are registered for all modules of the process, which TorchDynamo does not guard."""
    return _has_any_global_hook()


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run around a module's forward or backward."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or hooks_on_everything()


class Watch:
    """Tells what TorchDynamo does not look for in a region once it has traced it: hooks, also of modules that were put
    in, and forwards of classes that were replaced. That takes little time where nothing has changed."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._looked_at = module, -1
        self._hooks: list[dict[int, Any]] = []
        self._classes: list[Any] = []
        self._children: list[tuple[dict[str, Any], tuple[Any, ...]]] = []

    def state(self) -> tuple[Any, ...]:
        """Return whether there are hooks, and the forwards of all classes, as they are now."""
        registered = RemovableHandle.next_id  # counts up with every hook in the process
        if registered != self._looked_at or any(tuple(d.values()) != seen for d, seen in self._children):
            self._looked_at = registered
            modules = list(_inside(self._module))
            self._hooks = [hooks for module in modules for hooks in _hooks(module) if hooks]
            self._classes = list(dict.fromkeys(map(type, modules)))
            self._children = [(m._modules, tuple(m._modules.values())) for m in modules if m._modules]
        return any(self._hooks), *[kind.forward for kind in self._classes]


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all in it; faster than `modules`, as it may give one twice."""
    waiting = [module]
    while waiting:
        module = waiting.pop()
        yield module
        waiting += [child for child in module._modules.values() if child is not None]
