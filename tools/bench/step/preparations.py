"""How each contender makes a model ready to train: the way its own documentation says, from the same folder.

Each function runs in a process of its own, and imports what it needs itself: Unsloth wants to come before transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastlora.tools.bench.step import weights


@dataclass(frozen=True)
class Place:
    """Where the weights are, where they shall run, and how long the sequences will be."""

    folder: Path
    device: torch.device
    length: int


@dataclass(frozen=True)
class Prepared:
    """A model with adapters, and what can be said of it after it has run."""

    model: Any
    describe: Callable[[], dict[str, Any]] = dict


def eager(place: Place, checkpointing: bool = False) -> Prepared:
    """transformers and PEFT as they are."""
    return Prepared(_adapted(place, checkpointing))


def compiled_layers(place: Place) -> Prepared:
    """torch.compile on every decoder layer."""
    model = _adapted(place)
    _compile_layers(model)
    return Prepared(model)


def compiled_whole(place: Place) -> Prepared:
    """torch.compile on the model, loss included."""
    model = _adapted(place)
    model.compile()
    return Prepared(model)


def with_fastlora(place: Place, checkpointing: bool = False, without: str | None = None, **options: Any) -> Prepared:
    """fastlora, with options of `fastlora.compile`, or without one of its shortcuts."""
    import fastlora
    from fastlora.kernels.core import shortcuts

    if without is not None:
        setattr(shortcuts.use, without, False)
    model = fastlora.compile(_adapted(place, checkpointing), **options)

    def describe() -> dict[str, Any]:
        report = fastlora.report(model)
        coverage = {name: {"seen": item.seen, "fused": item.fused} for name, item in report.coverage.items()}
        missed = [{"op": miss.op, "reason": miss.reason, "count": miss.count} for miss in report.missed]
        return {"coverage": coverage, "missed": missed, "notes": list(report.notes)}

    return Prepared(model, describe)


def with_liger(place: Place, compiled: bool = False) -> Prepared:
    """Liger, which patches the model's classes before the model is made."""
    import liger_kernel.transformers as liger
    from transformers import AutoConfig

    model_type = AutoConfig.from_pretrained(weights.model_folder(place.folder)).model_type
    getattr(liger, f"apply_liger_kernel_to_{model_type}")()
    model = _adapted(place)
    if compiled:
        _compile_layers(model)
    return Prepared(model)


def with_unsloth(place: Place, checkpointing: bool = False) -> Prepared:
    """Unsloth with weights as they are to be; its checkpointing is the mode that it calls "unsloth"."""
    from unsloth import FastLanguageModel

    mode, quant = "unsloth" if checkpointing else False, weights.quantisation(place.folder)
    model, _ = FastLanguageModel.from_pretrained(
        str(weights.model_folder(place.folder)),
        max_seq_length=place.length,
        dtype=torch.bfloat16,
        load_in_4bit=quant is not None,
        load_in_16bit=quant is None,
        use_gradient_checkpointing=mode,
        use_exact_model_name=True,
        fix_tokenizer=False,
    )
    model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=mode, **weights.lora_options())
    weights.load_adapters(model, place.folder)
    FastLanguageModel.for_training(model, use_gradient_checkpointing=mode)
    return Prepared(model)


def _adapted(place: Place, checkpointing: bool = False) -> Any:
    model = weights.adapted(weights.load(place.folder, place.device), place.folder)
    if checkpointing:
        checkpoint(model)
    return model


def checkpoint(model: Any) -> None:
    """Gradient checkpointing as transformers' Trainer turns it on."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _compile_layers(model: Any) -> None:
    for layer in model.get_base_model().model.layers:
        layer.compile()
