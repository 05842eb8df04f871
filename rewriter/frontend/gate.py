"""The gate in a region's compiled-call slot, which decides for each call whether the region runs compiled.

The slot is the one that `nn.Module.compile` uses. It is not part of the state dict, and pickling and copying drop it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fastlora.compat.dynamo import BackendCompilerFailed, TorchRuntimeError
from fastlora.compat.dynamo import config as _dynamo
from fastlora.compat.dynamo import shape_config as _shapes
from fastlora.compat.modules import global_hooks_exist, uncompiled_call
from fastlora.errors import FastLoRAError
from fastlora.frontend.bypass import UnguardedState, calling_module, has_hooks, unsupported_transform
from fastlora.frontend.compile_graph import backend_for
from fastlora.frontend.peft_shims import use_peft_shims
from fastlora.frontend.regions import Region, is_torch_class
from fastlora.frontend.session import Session

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
_GRAPHS_PER_BLOCK = 64
"""The recompile limit. Layers share code, which may need a graph for each kind of layer (sliding or full attention),
gradient mode and kind of shapes; with TorchDynamo's default of 8, all layers would run uncompiled after the eighth."""


class Gate:
    """Runs a region compiled while gradients are enabled and there is no KV cache, and uncompiled otherwise.

    Generation and evaluation therefore neither recompile nor use up the recompile limit that training needs.
    """

    def __init__(self, region: Region, session: Session) -> None:
        module: Any = region.module
        self._region, self.session, self._module = region.name, session, module
        self._is_torch_class = is_torch_class(module)
        self._target: Any = module.forward if self._is_torch_class else uncompiled_call(module)
        self._unguarded_state = UnguardedState(module)
        self._compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._module
        if not torch.compiler.is_compiling():
            module = calling_module(module)
        reason = self._bypass(module, kwargs)
        if reason is not None:
            if reason:
                self.session.bypassed[reason] += 1
            return uncompiled_call(module)(*args, **kwargs)
        try:
            return self._run(*args, **kwargs)
        except BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, FastLoRAError):  # the message is for the user
                raise failure.inner_exception from None
            raise

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the region compiled.

        A size of one that is broadcast cannot be traced as a dynamic size. If tracing fails so before anything has run,
        trace the region again with sizes of one specialized.
        """
        session = self.session
        executions = session.executions
        try:
            result = self._run_compiled(*args, **kwargs)
        except TorchRuntimeError:
            if not session.size_oblivious or session.executions > executions:
                raise
            session.size_oblivious = False
            result = self._run_compiled(*args, **kwargs)
        finally:
            if session.executions > executions + 1:  # after a graph break, the first graph runs before the next trace
                session.size_oblivious = False
        session.end_region(self._region, type(self._module), session.executions - executions)
        return result

    def _run_compiled(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        session.begin_region(self._region, type(self._module))
        state = self._unguarded_state.current()
        run = self._compiled.get(state)
        if run is None:
            run = self._compiled[state] = torch.compile(self._target, backend=backend_for(session, state))
        before = _dynamo.recompile_limit, _shapes.backed_size_oblivious, _dynamo.suppress_errors
        _dynamo.recompile_limit, _shapes.backed_size_oblivious = _GRAPHS_PER_BLOCK, session.size_oblivious
        session.before_graph, session.error = _suppress_errors, None
        try:
            with use_peft_shims(), _guarded_hooks() if state[0] else nullcontext():
                result = run(*args, **kwargs)
        finally:
            session.before_graph = None
            _dynamo.recompile_limit, _shapes.backed_size_oblivious, _dynamo.suppress_errors = before
        if session.error is not None:
            raise session.error
        return result

    def _bypass(self, module: nn.Module, kwargs: dict[str, Any]) -> str | None:
        """Return why to run uncompiled, None to run compiled; an empty reason is not reported."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return ""
        if module is not self._module:
            return "a replica of nn.DataParallel runs uncompiled; use DistributedDataParallel to train on several GPUs"
        if (reason := unsupported_transform()) is not None:
            return reason
        if global_hooks_exist():
            return "hooks are registered on all modules (register_module_forward_hook and the like)"
        if any(kwargs.get(name) is not None for name in _CACHES):
            return "a KV cache was passed; use_cache=False avoids that in training"
        if self._is_torch_class and has_hooks(module):
            return f"{type(self._module).__name__} is a class of torch.nn and has hooks"
        return None


@contextmanager
def _guarded_hooks() -> Iterator[None]:
    """Make TorchDynamo guard on hooks; otherwise it ignores hooks that are registered or removed after tracing. These
    guards take as long as all others, so only regions with hooks have them, in separate graphs."""
    before, _dynamo.skip_nnmodule_hook_guards = _dynamo.skip_nnmodule_hook_guards, False
    try:
        yield
    finally:
        _dynamo.skip_nnmodule_hook_guards = before


def _suppress_errors() -> None:
    """Make TorchDynamo run uncompiled what it cannot trace: once a part of a region has run, the region cannot be
    traced again from the start."""
    _dynamo.suppress_errors = True
