"""Installing gates on a model: on its repeated blocks, on its output head and on the model itself."""

from __future__ import annotations

import weakref

from torch import nn

from fastlora.compat.modules import compiled_call, set_compiled_call
from fastlora.errors import StrictError
from fastlora.frontend.gate import Gate
from fastlora.frontend.head_gate import HeadGate, deferral_problem, is_vocabulary
from fastlora.frontend.model_gate import CacheGate, FirstStep, ModelGate, builds_cache
from fastlora.frontend.regions import find_regions
from fastlora.frontend.session import Session

SLOTS = (CacheGate, Gate, HeadGate)
"""The gates that `install` puts into compiled-call slots."""


def install(model: nn.Module, session: Session, first_step: FirstStep | None = None) -> None:
    """Install gates in the compiled-call slots of a model and of its regions.

    Args:
        model: the model.
        session: the session that compiles its graphs.
        first_step: called with the arguments of each call of the model; returns False if the model must not run
            compiled.

    Raises:
        StrictError: if the session is strict and the loss of the output head cannot be fused.
    """
    inner = None
    name, head = _output_head(model)
    problem = deferral_problem(head)
    defers = session.options.defer_logits and problem is None
    regions = find_regions(model, head if defers else None)
    if head is not None and is_vocabulary(head):
        session.head_problem = problem if session.options.defer_logits else "defer_logits=False"
        traced = any(head in region.module.modules() for region in regions)
        if session.options.strict and session.head_problem is not None and not traced:
            raise StrictError(f"strict=True, and the loss of {name or 'the head'} is not fused: {problem}")
    for region in regions:
        gate = Gate(region, session)
        if region.module is model:
            inner = gate
        else:
            set_compiled_call(region.module, gate)
    if head is not None and inner is None:
        session.head = name
        if defers:
            session.head_layer = weakref.ref(head)  # type: ignore[arg-type]
            path = name.split(".")
            around = [model.get_submodule(".".join(path[:n])) for n in reversed(range(len(path)))]
            set_compiled_call(head, HeadGate(head, session, around))  # type: ignore[arg-type]
    set_compiled_call(model, ModelGate(model, session, inner, first_step))
    if not builds_cache(model):
        for child in model.children():
            _install_cache_gates(child, session)


def _install_cache_gates(module: nn.Module, session: Session) -> None:
    """Install gates on the models inside a wrapper that would build KV caches."""
    if compiled_call(module) is None and builds_cache(module):
        set_compiled_call(module, CacheGate(module, session))
    elif not isinstance(compiled_call(module), SLOTS):
        for child in module.children():
            _install_cache_gates(child, session)


def _output_head(model: nn.Module) -> tuple[str, nn.Module | None]:
    """Return the path and the module of the layer that computes the logits: transformers' output embeddings, of the
    model or of one inside it, or else the last linear layer outside of the compiled regions."""
    names = {module: name for name, module in model.named_modules()}
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        head = get() if get is not None else None
        if head is not None:
            return names.get(head, ""), head
    inside = {inner for region in find_regions(model) for inner in region.module.modules()}
    linears = [module for module in model.modules() if type(module) is nn.Linear and module not in inside]
    return (names[linears[-1]], linears[-1]) if linears else ("", None)
