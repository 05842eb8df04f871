"""The public functions `compile`, `disable`, `explain` and `report`; `check` is in `fastlora.checking.check`."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from fastlora.checking.check import FirstStep
from fastlora.compat.dynamo import traced_seconds
from fastlora.compat.modules import compiled_call, set_compiled_call
from fastlora.errors import FastLoRAError
from fastlora.frontend.arguments import require_keywords, require_module
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
    """Compile a model in place for training, block by block, and return it.

    Class, state-dict keys, saving, merging, adapter switching and generation do not change. Nothing is traced until the
    first step with gradients. Calling it again replaces the earlier compilation.

    Args:
        model: a PEFT model, a transformers model, or any `nn.Module`.
        memory_budget: bytes of activations, such as `"8GiB"`, that one forward may keep on a GPU for its backward;
            what exceeds them is offloaded to the host or recomputed. None for no limit, 0 for as little as possible. It
            has no effect on blocks with gradient checkpointing, which keep next to nothing.
        mode: `default` replays a block as CUDA graphs, from the third or fourth step of a shape on, where the GPU was
            seen waiting for launches, as with small batches; each shape takes memory. `reduce-overhead` replays in any
            case, `no-cudagraphs` never. `max-autotune` is a mode of Inductor, and with `lower="inductor"` all are.
        lower: `eager` runs the rewritten graphs as they are, `inductor` compiles what no rule covers, `auto` is `eager`
            unless `mode` is one of Inductor's.
        rules: the rules to apply instead of `fastlora.default_rules()`.
        strict: raise `StrictError` if a candidate for fusion is not fused.
        verify: True replays each match in float64 against the fused op before it is used, and does not use it if they
            differ. `"first-step"` checks the first training step as `fastlora.check` does, and goes back to eager with
            a warning if it is wrong.
        defer_logits: let the output head defer its product, so that a loss on it never computes the logits.

    Raises:
        FastLoRAError: if an argument is invalid; the message says which, and what to do.
    """
    require_module(model, "compile")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise FastLoRAError(
            "model has parameters on the meta device: load its weights first, or call fastlora.explain to see what "
            "would be fused"
        )
    session = Session(Options(lower, mode, strict, verify, defer_logits, parse_bytes(memory_budget)), rules)
    disable(model)
    install(model, session, FirstStep(model, session) if verify == "first-step" else None)
    weakref.finalize(model, _drop_cuda_graphs, weakref.ref(session)).atexit = False
    return model


def disable(model: Model) -> Model:
    """Undo `compile`, and return the model.

    Raises:
        FastLoRAError: if `model` is not an `nn.Module`.
    """
    require_module(model, "disable")
    if isinstance(gate := compiled_call(model), ModelGate):
        gate.session.drop_cuda_graphs()
    for module in model.modules():
        if isinstance(compiled_call(module), SLOTS):
            set_compiled_call(module, None)
    return model


def explain(model: nn.Module, *args: Any, rules: Sequence[AnyRule] | None = None, **batch: Any) -> Report:
    """Trace and match one training step without running it, and report what `compile` would fuse.

    The model does not change. Compiled blocks return zeros; only the code between them runs.

    Args:
        model: as for `compile`.
        rules: as for `compile`.
        **batch: the arguments of the model's forward, such as `input_ids` and `labels`.

    Raises:
        FastLoRAError: if an argument is invalid; the message says which, and what to do.
    """
    require_keywords(args, "explain")
    require_module(model, "explain")
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
        model: a model that `fastlora.compile` returned, a model that contains it, or a part of it; None for what
            `torch.compile(backend="fastlora")` has compiled in this process.

    Raises:
        FastLoRAError: if the model is not compiled.
    """
    if model is None:
        from fastlora.frontend.dynamo_backend import default_session

        collected = collect(default_session())
        collected.seconds.trace = traced_seconds()
        return collected
    require_module(model, "report")
    for module in model.modules():
        if isinstance(slot := compiled_call(module), SLOTS):
            return collect(slot.session)
    raise FastLoRAError("model is not compiled by fastlora; call fastlora.compile(model) first")


def _drop_cuda_graphs(session: weakref.ref[Session]) -> None:
    """Free the CUDA graphs of a model that was deleted, whose session TorchDynamo keeps alive."""
    alive = session()
    if alive is not None:
        alive.drop_cuda_graphs()


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})
