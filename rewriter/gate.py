"""Gates: what sits in a module's compiled-call slot and decides, call by call, whether the compiled path may run.

The slot is the one that `nn.Module.compile` uses. It is no part of the state dict, and pickling and copying drop it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch._dynamo import config as _dynamo
from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError
from torch.fx.experimental import _config as _shapes

from fastlora.errors import FastLoRAError
from fastlora.regions import Region, is_torch_class
from fastlora.session import Session
from fastlora.standins import traceable

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
        self._region, self._session, self._module = region.name, session, module
        self._is_torch_class = is_torch_class(module)
        target: Any = module.forward if self._is_torch_class else module._call_impl
        self._compiled = torch.compile(target, backend=session.compile_graph)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        reason = self._bypass(kwargs)
        if reason is not None:
            if reason:
                self._session.bypassed[reason] += 1
            return self._module._call_impl(*args, **kwargs)
        try:
            return self._run(*args, **kwargs)
        except BackendCompilerFailed as failure:
            if isinstance(failure.inner_exception, FastLoRAError):  # ours, with a message for the user
                raise failure.inner_exception from None
            raise

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """A size of one that is there to be broadcast may be taken for one that changes, and then it fits nothing: if
        nothing has run yet, the region is traced again."""
        session = self._session
        ran = session.executions
        try:
            return self._traced(*args, **kwargs)
        except TorchRuntimeError:
            if not session.oblivious or session.executions > ran:
                raise
            session.oblivious = False
            return self._traced(*args, **kwargs)
        finally:
            if session.executions > ran + 1:  # it runs in pieces, of which the first has run when a later one is traced
                session.oblivious = False

    def _traced(self, *args: Any, **kwargs: Any) -> Any:
        session = self._session
        session.enter(self._region)
        before = _dynamo.recompile_limit, _shapes.backed_size_oblivious, _dynamo.suppress_errors
        _dynamo.recompile_limit, _shapes.backed_size_oblivious = _GRAPHS_PER_BLOCK, session.oblivious
        session.on_piece, session.refusal = _run_what_cannot_be_traced, None
        try:
            with traceable():
                result = self._compiled(*args, **kwargs)
        finally:
            session.on_piece = None
            _dynamo.recompile_limit, _shapes.backed_size_oblivious, _dynamo.suppress_errors = before
        if session.refusal is not None:
            raise session.refusal
        return result

    def _bypass(self, kwargs: dict[str, Any]) -> str | None:
        """Why not to run compiled; empty where that is as it should be, None to run compiled."""
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return ""
        if any(kwargs.get(name) is not None for name in _CACHES):
            return "a KV cache was passed; use_cache=False avoids that in training"
        if self._is_torch_class and (self._module._forward_hooks or self._module._forward_pre_hooks):
            return f"{type(self._module).__name__} is a class of PyTorch's own and has hooks"
        return None


def _run_what_cannot_be_traced() -> None:
    """Once a piece of a region has run, the region cannot be run again: if TorchDynamo fails at a later piece, it is to
    run that one as it is."""
    _dynamo.suppress_errors = True


class ModelGate:
    """Sits on the whole model: a training step needs no KV cache, so none is built for it unless it is asked for.

    Nor where that would change what is computed: positions without a mask tell the sequences of a packed row apart, but
    in transformers only if there is no cache; and a prefix that PEFT has learned comes in one, which some models ignore
    unless they are to use it.
    """

    def __init__(self, model: nn.Module, session: Session, inner: Gate | None) -> None:
        self._model: Any = model
        self.session, self._inner = session, inner
        base: Any = getattr(model, "get_base_model", None)
        base = base() if base is not None else model
        parameters = inspect.signature(base.forward).parameters
        handed_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and "past_key_values" in parameters
        config = getattr(base, "config", None)
        inner_config = getattr(config, "get_text_config", lambda: None)()  # of a model that sees, its decoder's own
        cached = any(hasattr(each, "use_cache") for each in (config, inner_config))
        self._caches = "use_cache" in parameters or (handed_on and cached)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        asked = any(kwargs.get(name) is not None for name in ("use_cache", "past_key_values"))
        asked |= kwargs.get("position_ids") is not None and kwargs.get("attention_mask") is None
        training = self._model.training or kwargs.get("labels") is not None
        if self._caches and training and not asked and not self._has_prompts() and torch.is_grad_enabled():
            kwargs["use_cache"] = False
        if self.session.thrift is not None:
            self.session.thrift.begin()
        return self._inner(*args, **kwargs) if self._inner is not None else self._model._call_impl(*args, **kwargs)

    def _has_prompts(self) -> bool:
        """Whether PEFT puts something learned before the tokens."""
        configs = getattr(self._model, "peft_config", None) or {}
        return any(config.is_prompt_learning for config in configs.values())
