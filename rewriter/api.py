"""The public functions: compile, disable, explain, report."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from fastlora.budget import parse
from fastlora.engine import AnyRule
from fastlora.errors import FastLoRAError, StrictError
from fastlora.gate import Gate
from fastlora.head import DeferringHead, is_vocabulary, why_not
from fastlora.model_gate import CacheGate, ModelGate, builds_cache
from fastlora.regions import find_regions
from fastlora.report import Report
from fastlora.session import Options, Session

Model = TypeVar("Model", bound=nn.Module)


def compile(
    model: Model,
    *,
    memory_budget: str | int | None = None,
    mode: str = "default",
    lower: str = "auto",
    rules: Sequence[AnyRule] | None = None,
    strict: bool = False,
    verify: bool | str = False,
    defer_logits: bool = True,
) -> Model:
    """Compiles a model in place for training, block by block, and returns it.

    Class, state-dict keys, saving, merging, adapter switching and generation stay as they are. Nothing is traced until
    the first step with gradients. Calling it again replaces the earlier compilation.

    Args:
        model: a PEFT model, a transformers model, or any `nn.Module`.
        memory_budget: bytes of activations, e.g. `"8GiB"`, that the regions of one forward may keep on a GPU for their
            backward; what is beyond lies on the host in between, or is made again. None for no limit, 0 for as little
            as can be. Where gradient checkpointing is on there is nothing to keep, and it has no effect.
        mode: `default`, which replays a region as CUDA graphs from the third or fourth step of a shape on where the GPU
            was seen waiting for launches, as it does with small batches; each shape so replayed keeps memory.
            `reduce-overhead` replays in any case, `no-cudagraphs` in none. `max-autotune` is Inductor's, and with
            `lower="inductor"` all of them are.
        lower: `eager` runs the rewritten graphs as they are, `inductor` compiles what no pattern covered, `auto`
            chooses (`eager`, unless `mode` asks for Inductor).
        rules: the rules to apply, in place of `fastlora.default_rules()`.
        strict: raise `StrictError` if a candidate for fusion stays as it was.
        verify: True replays each match in float64 against the fused op before it is used, and leaves it alone if they
            differ. `"first-step"` checks the first training step as `fastlora.check` does, and goes back to eager with
            a warning if it is wrong.
        defer_logits: let the output head defer its product, so that a loss on it never makes the logits.

    Raises:
        FastLoRAError: if an argument has no meaning; the message says which and what to do.
    """
    _insist_on_module(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise FastLoRAError(
            "model has parameters on the meta device: load its weights first, or use fastlora.explain to see what "
            "would be fused"
        )
    session = Session(Options(lower, mode, strict, verify, defer_logits, parse(memory_budget)), rules)
    disable(model)
    _install(model, session)
    weakref.finalize(model, _forget, weakref.ref(session)).atexit = False
    return model


def disable(model: Model) -> Model:
    """Undo `compile`: the model is what it was.

    Raises:
        FastLoRAError: if this is no `nn.Module`.
    """
    _insist_on_module(model)
    if isinstance(model._compiled_call_impl, ModelGate):
        model._compiled_call_impl.session.forget()
    for module in model.modules():
        if isinstance(module._compiled_call_impl, _SLOTS):
            module._compiled_call_impl = None
    return model


def explain(model: nn.Module, rules: Sequence[AnyRule] | None = None, **batch: Any) -> Report:
    """Traces and matches one training step without running it, and reports what `compile` would do.

    The model stays as it is. The compiled regions are traced and stand in as zeros; only the glue between them runs.

    Args:
        model: as for `compile`.
        rules: as for `compile`.
        **batch: what the model's forward takes, e.g. `input_ids` and `labels`.
    """
    _insist_on_module(model)
    session = Session(Options(dry=True), rules)
    slots = {module: module._compiled_call_impl for module in model.modules()}
    try:
        disable(model)
        _install(model, session)
        with torch.enable_grad(), torch.random.fork_rng(devices=_devices(model)):
            model(**batch)
    finally:
        for module, slot in slots.items():
            module._compiled_call_impl = slot
    return session.report()


def report(model: nn.Module | None = None) -> Report:
    """Return what has been fused so far in a compiled model.

    Args:
        model: a model that `fastlora.compile` returned, one that holds it, or a part of it; None for what
            `torch.compile(backend="fastlora")` has compiled in this process.

    Raises:
        FastLoRAError: if the model is not compiled.
    """
    if model is None:
        from fastlora.backend import default_session, traced_seconds

        collected = default_session().report()
        collected.seconds.trace = traced_seconds()
        return collected
    _insist_on_module(model)
    for module in model.modules():
        if isinstance(slot := module._compiled_call_impl, _SLOTS):
            return slot.session.report()
    raise FastLoRAError("model is not compiled by fastlora; call fastlora.compile(model) first")


_SLOTS = (CacheGate, Gate, DeferringHead)


def _insist_on_module(model: Any) -> None:
    """Raise a sentence for what is no model that can be compiled."""
    if not isinstance(model, nn.Module):
        raise FastLoRAError(f"model is a {type(model).__name__}, not an nn.Module; pass the model itself")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise FastLoRAError("model comes from torch.compile: pass the model itself, fastlora.compile(model._orig_mod)")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            which = f"the module {name!r} of model" if name else "model"
            raise FastLoRAError(f"{which} is a TorchScript module, which cannot be traced; use what it was made of")


def _forget(session: weakref.ref[Session]) -> None:
    """TorchDynamo keeps what it compiled, and thereby a session, longer than the model."""
    alive = session()
    if alive is not None:
        alive.forget()


def _install(model: nn.Module, session: Session) -> None:
    inner = None
    name, head = _output_head(model)
    problem = why_not(head)
    defers = session.options.defer_logits and problem is None
    regions = find_regions(model, head if defers else None)
    if head is not None and is_vocabulary(head):
        session.head_problem = problem if session.options.defer_logits else "defer_logits=False"
        traced = any(head in region.module.modules() for region in regions)
        if session.options.strict and session.head_problem is not None and not traced:
            raise StrictError(f"strict=True, and the loss of {name or 'the head'} stays as it is: {problem}")
    for region in regions:
        gate = Gate(region, session)
        if region.module is model:
            inner = gate
        else:
            region.module._compiled_call_impl = gate  # type: ignore[assignment]
    if head is not None and inner is None:
        session.head = name
        if defers:
            session.head_layer = head  # type: ignore[assignment]
            path = name.split(".")
            around = [model.get_submodule(".".join(path[:n])) for n in reversed(range(len(path)))]
            head._compiled_call_impl = DeferringHead(head, session, around)  # type: ignore[arg-type, assignment]
    model._compiled_call_impl = ModelGate(model, session, inner)  # type: ignore[assignment]
    if not builds_cache(model):
        for child in model.children():
            _install_cache_gates(child, session)


def _install_cache_gates(module: nn.Module, session: Session) -> None:
    """Put gates on the models inside of a wrapper that would build KV caches."""
    if module._compiled_call_impl is None and builds_cache(module):
        module._compiled_call_impl = CacheGate(module, session)  # type: ignore[assignment]
    elif not isinstance(module._compiled_call_impl, _SLOTS):
        for child in module.children():
            _install_cache_gates(child, session)


def _output_head(model: nn.Module) -> tuple[str, nn.Module | None]:
    """The layer that makes the logits: what transformers calls the output embeddings of the model or of one inside of
    it, else the last linear layer outside of the compiled regions."""
    names = {module: name for name, module in model.named_modules()}
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        head = get() if get is not None else None
        if head is not None:
            return names.get(head, ""), head
    inside = {inner for region in find_regions(model) for inner in region.module.modules()}
    linears = [module for module in model.modules() if type(module) is nn.Linear and module not in inside]
    return (names[linears[-1]], linears[-1]) if linears else ("", None)


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
