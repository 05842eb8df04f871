"""The gates on a model and on the models inside it, which turn off the KV cache in training."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastlora.compat.modules import uncompiled_call
from fastlora.frontend.bypass import calling_module
from fastlora.frontend.gate import Gate
from fastlora.frontend.session import Session

FirstStep = Callable[[tuple[Any, ...], dict[str, Any]], bool]
"""Called with the arguments of each call of the model; returns whether to run it compiled."""


class CacheGate:
    """Passes `use_cache=False` in training to a model that would otherwise build a KV cache.

    Calls that would compute something else without a cache do not change: transformers separates packed sequences by
    their positions, without a mask, only if there is no cache, and PEFT passes a learned prefix as a cache.
    """

    def __init__(self, model: nn.Module, session: Session) -> None:
        self._model: Any = model
        self.session = session
        self._cached_answer: tuple[Any, Any, bool] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model: Any = self._model if torch.compiler.is_compiling() else calling_module(self._model)
        return self._run(model, args, self._without_cache(model, kwargs))

    def _run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return uncompiled_call(model)(*args, **kwargs)

    def _without_cache(self, model: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        is_requested = any(kwargs.get(name) is not None for name in ("use_cache", "past_key_values"))
        may_be_packed = kwargs.get("position_ids") is not None and kwargs.get("attention_mask") is None
        training = model.training or kwargs.get("labels") is not None
        if is_requested or may_be_packed or not training or not torch.is_grad_enabled():
            return kwargs
        if not self._builds_cache(model) or _has_prompts(model):
            return kwargs
        return {**kwargs, "use_cache": False}

    def _builds_cache(self, model: nn.Module) -> bool:
        """Return `builds_cache(model)`, cached until a forward is replaced."""
        outer, inner = vars(model).get("forward"), vars(_base(model)).get("forward")
        cached = self._cached_answer
        if cached is None or cached[0] is not outer or cached[1] is not inner:
            cached = self._cached_answer = (outer, inner, builds_cache(model))
        return cached[2]


class ModelGate(CacheGate):
    """The gate on the model that was compiled."""

    def __init__(
        self, model: nn.Module, session: Session, inner: Gate | None, first_step: FirstStep | None = None
    ) -> None:
        super().__init__(model, session)
        self._inner, self._first_step = inner, first_step

    def _run(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._first_step is not None and model is self._model and not self._first_step(args, kwargs):
            return super()._run(model, args, kwargs)  # the first step was wrong, and the gates were removed
        if self.session.budget is not None:
            self.session.budget.begin_forward()
        if self._inner is not None and model is self._model:
            return self._inner(*args, **kwargs)
        return super()._run(model, args, kwargs)


def builds_cache(model: nn.Module) -> bool:
    """Return whether the current forward of a model takes `use_cache` and builds a KV cache by default."""
    base = _base(model)
    if not (_has_own_forward(model) and _has_own_forward(base)):
        return False
    parameters = inspect.signature(base.forward).parameters
    passes_it_on = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) and "past_key_values" in parameters
    config = getattr(base, "config", None)
    text_config = getattr(config, "get_text_config", lambda: None)()  # the decoder of a multimodal model
    has_option = any(hasattr(each, "use_cache") for each in (config, text_config))
    return "use_cache" in parameters or (passes_it_on and has_option)


def _base(model: nn.Module) -> Any:
    """Return the model that PEFT has wrapped, or the model itself."""
    get: Any = getattr(model, "get_base_model", None)
    return get() if get is not None else model


def _has_own_forward(model: Any) -> bool:
    """Return whether `forward` is that of the class or wraps it; a replacement may take other arguments."""
    forward = vars(model).get("forward")
    if forward is None:
        return True
    unwrapped = inspect.unwrap(getattr(forward, "__func__", forward))
    return getattr(unwrapped, "__func__", unwrapped) is type(model).forward


def _has_prompts(model: nn.Module) -> bool:
    """Return whether PEFT puts learned prompts before the tokens."""
    configs = getattr(model, "peft_config", None) or {}
    return any(config.is_prompt_learning for config in configs.values())
