"""The public functions: compile, disable, explain, report."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from fastlora.checking.check import FirstStep
from fastlora.compat.dynamo import OptimizedModule, traced_seconds
from fastlora.compat.modules import compiled_call, set_compiled_call
from fastlora.errors import FastLoRAError
from fastlora.frontend.collect import collect
from fastlora.frontend.install import SLOTS, install
from fastlora.frontend.model_gate import ModelGate
from fastlora.frontend.options import Options
from fastlora.frontend.session import Session
from fastlora.match.rule import AnyRule
from fastlora.reports.model import Report
from fastlora.runtime.memory_planner import parse_bytes

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
    session = Session(Options(lower, mode, strict, verify, defer_logits, parse_bytes(memory_budget)), rules)
    disable(model)
    install(model, session, FirstStep(model, session) if verify == "first-step" else None)
    weakref.finalize(model, _forget, weakref.ref(session)).atexit = False
    return model


def disable(model: Model) -> Model:
    """Undo `compile`: the model is what it was.

    Raises:
        FastLoRAError: if this is no `nn.Module`.
    """
    _insist_on_module(model)
    if isinstance(gate := compiled_call(model), ModelGate):
        gate.session.forget()
    for module in model.modules():
        if isinstance(compiled_call(module), SLOTS):
            set_compiled_call(module, None)
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
    slots = {module: compiled_call(module) for module in model.modules()}
    try:
        disable(model)
        install(model, session)
        with torch.enable_grad(), torch.random.fork_rng(devices=_devices(model)):
            model(**batch)
    finally:
        for module, slot in slots.items():
            set_compiled_call(module, slot)
    return collect(session)


def report(model: nn.Module | None = None) -> Report:
    """Return what has been fused so far in a compiled model.

    Args:
        model: a model that `fastlora.compile` returned, one that holds it, or a part of it; None for what
            `torch.compile(backend="fastlora")` has compiled in this process.

    Raises:
        FastLoRAError: if the model is not compiled.
    """
    if model is None:
        from fastlora.frontend.dynamo_backend import default_session

        collected = collect(default_session())
        collected.seconds.trace = traced_seconds()
        return collected
    _insist_on_module(model)
    for module in model.modules():
        if isinstance(slot := compiled_call(module), SLOTS):
            return collect(slot.session)
    raise FastLoRAError("model is not compiled by fastlora; call fastlora.compile(model) first")


def _insist_on_module(model: Any) -> None:
    """Raise a sentence for what is no model that can be compiled."""
    if not isinstance(model, nn.Module):
        raise FastLoRAError(f"model is a {type(model).__name__}, not an nn.Module; pass the model itself")
    if isinstance(model, OptimizedModule):
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


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
