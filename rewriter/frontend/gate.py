"""Gates: what sits in a region's compiled-call slot and decides, call by call, whether the compiled path may run.

The slot is the one that `nn.Module.compile` uses. It is no part of the state dict, and pickling and copying drop it.
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
from fastlora.frontend.bypass import Watch, calling_module, has_hooks, transform
from fastlora.frontend.compile_graph import backend_for
from fastlora.frontend.peft_shims import traceable
from fastlora.frontend.regions import Region, is_torch_class
from fastlora.frontend.session import Session

_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")
_GRAPHS_PER_BLOCK = 64
"""One block may need a graph for each of its kinds (sliding or full attention, say), gradient modes and shape classes;
TorchDynamo's default of 8 would make the ninth fall back to eager, and with it all layers that share the code. One of
changing sizes serves batches of one as well ("oblivious"), which would take a graph of their own by default."""


class Gate:
    """Runs a region compiled while gradients are on and there is no KV cache, and as it was otherwise.

    Generation and evaluation thereby neither recompile nor use up the recompile limit that training needs.
    """

    def __init__(self, region: Region, session: Session) -> None:
        module: Any = region.module
        self._region, self.session, self._module = region.name, session, module
        self._is_torch_class = is_torch_class(module)
        self._target: Any = module.forward if self._is_torch_class else uncompiled_call(module)
        self._watch = Watch(module)
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
            if isinstance(failure.inner_exception, FastLoRAError):  # ours, with a message for the user
                raise failure.inner_exception from None
            raise

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """A size of one that is there to be broadcast may be taken for one that changes, and then it fits nothing: if
        nothing has run yet, the region is traced again."""
        session = self.session
        ran = session.executions
        try:
            result = self._traced(*args, **kwargs)
        except TorchRuntimeError:
            if not session.oblivious or session.executions > ran:
                raise
            session.oblivious = False
            result = self._traced(*args, **kwargs)
        finally:
            if session.executions > ran + 1:  # it runs in pieces, of which the first has run when a later one is traced
                session.oblivious = False
        session.leave(self._region, type(self._module), session.executions - ran)
        return result

    def _traced(self, *args: Any, **kwargs: Any) -> Any:
        session = self.session
        session.enter(self._region, type(self._module))
        state = self._watch.state()
        run = self._compiled.get(state)
        if run is None:
            run = self._compiled[state] = torch.compile(self._target, backend=backend_for(session, state))
        before = _dynamo.recompile_limit, _shapes.backed_size_oblivious, _dynamo.suppress_errors
        _dynamo.recompile_limit, _shapes.backed_size_oblivious = _GRAPHS_PER_BLOCK, session.oblivious
        session.before_graph, session.error = _run_what_cannot_be_traced, None
        try:
            with traceable(), _guarded_hooks() if state[0] else nullcontext():
                result = run(*args, **kwargs)
        finally:
            session.before_graph = None
            _dynamo.recompile_limit, _shapes.backed_size_oblivious, _dynamo.suppress_errors = before
        if session.error is not None:
            raise session.error
        return result

    def _bypass(self, module: nn.Module, kwargs: dict[str, Any]) -> str | None:
        """Why not to run compiled; empty where that is as it should be, None to run compiled."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return ""
        if module is not self._module:
            return "a replica of the model, as nn.DataParallel makes them, runs its own modules; use " + (
                "DistributedDataParallel to train compiled on several GPUs"
            )
        if (reason := transform()) is not None:
            return reason
        if global_hooks_exist():
            return "hooks are registered on all modules (register_module_forward_hook and the like)"
        if any(kwargs.get(name) is not None for name in _CACHES):
            return "a KV cache was passed; use_cache=False avoids that in training"
        if self._is_torch_class and has_hooks(module):
            return f"{type(self._module).__name__} is a class of PyTorch's own and has hooks"
        return None


@contextmanager
def _guarded_hooks() -> Iterator[None]:
    """Hooks that come or go after a module was traced are ignored unless they are guarded, which takes as long as all
    other guards: that is done only in graphs of their own, for regions that have some."""
    before, _dynamo.skip_nnmodule_hook_guards = _dynamo.skip_nnmodule_hook_guards, False
    try:
        yield
    finally:
        _dynamo.skip_nnmodule_hook_guards = before


def _run_what_cannot_be_traced() -> None:
    """Once a piece of a region has run, the region cannot be run again: if TorchDynamo fails at a later piece, it is to
    run that one as it is."""
    _dynamo.suppress_errors = True
