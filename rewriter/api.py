"""The public functions: compile, disable, explain, report."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from fastlora.budget import parse
from fastlora.deferred import DeferringHead, can_defer
from fastlora.engine import AnyRule
from fastlora.errors import FastLoRAError
from fastlora.gate import Gate, ModelGate
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
    verify: bool = False,
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
        verify: before a match is used, replay it in fp64 against the fused op, and leave it alone if they differ.
        defer_logits: let the output head defer its product, so that a loss on it never makes the logits.

    Raises:
        FastLoRAError: if an argument has no meaning; the message says which and what to do.
    """
    if not isinstance(model, nn.Module):
        raise FastLoRAError(f"model is a {type(model).__name__}, not an nn.Module")
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise FastLoRAError("model comes from torch.compile: pass the model itself, fastlora.compile(model._orig_mod)")
    session = Session(Options(lower, mode, strict, verify, defer_logits, parse(memory_budget)), rules)
    disable(model)
    _install(model, session)
    weakref.finalize(model, _forget, weakref.ref(session)).atexit = False
    return model


def disable(model: Model) -> Model:
    """Undoes `compile`: the model is what it was."""
    if isinstance(model._compiled_call_impl, ModelGate):
        model._compiled_call_impl.session.forget()
    for module in model.modules():
        if isinstance(module._compiled_call_impl, (Gate, ModelGate, DeferringHead)):
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
    """What has been fused so far in a compiled model.

    Args:
        model: a model that `fastlora.compile` returned; None for what `torch.compile(backend="fastlora")` has compiled
            in this process.

    Raises:
        FastLoRAError: if the model is not compiled.
    """
    if model is None:
        from fastlora.backend import default_session, traced_seconds

        collected = default_session().report()
        collected.seconds.trace = traced_seconds()
        return collected
    gate = model._compiled_call_impl
    if not isinstance(gate, ModelGate):
        raise FastLoRAError("model is not compiled by fastlora; call fastlora.compile(model) first")
    return gate.session.report()


def _forget(session: weakref.ref[Session]) -> None:
    """TorchDynamo keeps what it compiled, and thereby a session, longer than the model."""
    alive = session()
    if alive is not None:
        alive.forget()


def _install(model: nn.Module, session: Session) -> None:
    inner = None
    name, head = _output_head(model)
    defers = session.options.defer_logits and head is not None and can_defer(head)
    for region in find_regions(model, head if defers else None):
        gate = Gate(region, session)
        if region.module is model:
            inner = gate
        else:
            region.module._compiled_call_impl = gate
    if head is not None and inner is None:
        session.head = name
        if defers:
            session.head_layer = head  # type: ignore[assignment]
            head._compiled_call_impl = DeferringHead(head, session.tally)  # type: ignore[arg-type]
    model._compiled_call_impl = ModelGate(model, session, inner)  # type: ignore[assignment]


def _output_head(model: nn.Module) -> tuple[str, nn.Module | None]:
    """The layer that makes the logits: what transformers calls the output embeddings, else the last linear layer
    outside of the compiled regions."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if get is not None else None
    if head is None:
        inside = {inner for region in find_regions(model) for inner in region.module.modules()}
        linears = [module for module in model.modules() if type(module) is nn.Linear and module not in inside]
        head = linears[-1] if linears else None
    names = {module: name for name, module in model.named_modules()}
    return names.get(head, ""), head  # type: ignore[arg-type]


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
