"""Conditions under which a call runs uncompiled, or in separate graphs: replicas, transforms, modes and hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from fastlora.compat.autograd import forward_mode_is_active
from fastlora.compat.dispatch import dispatch_modes, function_modes_change_results, functorch_interpreter
from fastlora.compat.modules import children_of, global_hooks_exist, hooks_of, module_of_call


def calling_module(original: nn.Module) -> nn.Module:
    """Return the module whose `__call__` has called the caller of this function: `original`, or a replica of it.

    `nn.DataParallel` makes replicas by copying a module's `__dict__`, including the compiled-call slot, and the gate in
    the slot has to run the replica's modules. PyTorch does not pass the module to the gate, so it is read from the
    frame of `nn.Module.__call__`.
    """
    module = module_of_call(2)
    return original if module is None else module


def unsupported_transform() -> str | None:
    """Return a sentence on the active transform that fused ops do not support, None if there is none."""
    if functorch_interpreter() is not None:
        return "a transform of torch.func is active"
    if forward_mode_is_active():
        return "forward-mode differentiation is active"
    return None


def has_active_modes() -> bool:
    """Return whether a mode is active that may change what operations do; a default device does not."""
    return bool(dispatch_modes()) or function_modes_change_results()


def has_hooks(module: nn.Module) -> bool:
    """Return whether hooks run around a module's forward or backward."""
    return any(hooks_of(module)) or global_hooks_exist()


class UnguardedState:
    """Tracks what TorchDynamo does not guard in a region: hooks, also on modules that were replaced, and the `forward`
    of each class. Reading the state is fast if nothing has changed."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._last_hook_id = module, -1
        self._hooks: list[dict[int, Any]] = []
        self._classes: list[Any] = []
        self._children: list[tuple[dict[str, Any], tuple[Any, ...]]] = []

    def current(self) -> tuple[Any, ...]:
        """Return whether there are hooks now, and the current `forward` of each class."""
        hook_id = RemovableHandle.next_id  # counts all hooks in the process
        if hook_id != self._last_hook_id or any(tuple(d.values()) != seen for d, seen in self._children):
            self._last_hook_id = hook_id
            modules = list(_modules(self._module))
            self._hooks = [hooks for module in modules for hooks in hooks_of(module) if hooks]
            self._classes = list(dict.fromkeys(map(type, modules)))
            children = [children_of(module) for module in modules]
            self._children = [(each, tuple(each.values())) for each in children if each]
        return any(self._hooks), *[kind.forward for kind in self._classes]


def _modules(module: nn.Module) -> Iterator[nn.Module]:
    """Yield a module and its submodules, some perhaps twice, which is faster than `modules()`."""
    stack = [module]
    while stack:
        module = stack.pop()
        yield module
        stack += [child for child in children_of(module).values() if child is not None]
