"""Functions that prepare the model of each contender for training, as its own documentation says.

Each runs in a process of its own, and imports libraries itself: Unsloth must be imported before transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastlora.tools.bench.step import weights


@dataclass(frozen=True)
class Workspace:
    """The folder with the weights, the device to train on, and the largest sequence length."""

    folder: Path
    device: torch.device
    length: int


@dataclass(frozen=True)
class Prepared:
    """A model with adapters; `describe` returns details for the results after it has run."""

    model: Any
    describe: Callable[[], dict[str, Any]] = dict


def eager(workspace: Workspace, checkpointing: bool = False) -> Prepared:
    """transformers and PEFT without changes."""
    return Prepared(_load_model(workspace, checkpointing))


def compiled_layers(workspace: Workspace) -> Prepared:
    """torch.compile on every decoder layer."""
    model = _load_model(workspace)
    _compile_layers(model)
    return Prepared(model)


def compiled_whole(workspace: Workspace) -> Prepared:
    """torch.compile on the whole model, loss included."""
    model = _load_model(workspace)
    model.compile()
    return Prepared(model)


def with_fastlora(
    workspace: Workspace, checkpointing: bool = False, without: str | None = None, **options: Any
) -> Prepared:
    """fastlora with options of `fastlora.compile`; `without` is the name of a shortcut to disable."""
    import fastlora
    from fastlora.kernels.core import shortcuts

    if without is not None:
        setattr(shortcuts.use, without, False)
    model = fastlora.compile(_load_model(workspace, checkpointing), **options)

    def describe() -> dict[str, Any]:
        report = fastlora.report(model)
        coverage = {name: {"seen": item.seen, "fused": item.fused} for name, item in report.coverage.items()}
        missed = [{"op": miss.op, "reason": miss.reason, "count": miss.count} for miss in report.missed]
        return {"coverage": coverage, "missed": missed, "notes": list(report.notes)}

    return Prepared(model, describe)


def with_liger(workspace: Workspace, compiled: bool = False) -> Prepared:
    """Liger, which patches the model classes before the model is loaded."""
    import liger_kernel.transformers as liger
    from transformers import AutoConfig

    model_type = AutoConfig.from_pretrained(weights.model_folder(workspace.folder)).model_type
    getattr(liger, f"apply_liger_kernel_to_{model_type}")()
    model = _load_model(workspace)
    if compiled:
        _compile_layers(model)
    return Prepared(model)


def with_unsloth(workspace: Workspace, checkpointing: bool = False) -> Prepared:
    """Unsloth; with checkpointing, in its own mode "unsloth"."""
    from unsloth import FastLanguageModel

    mode, quant = "unsloth" if checkpointing else False, weights.quantization(workspace.folder)
    model, _ = FastLanguageModel.from_pretrained(
        str(weights.model_folder(workspace.folder)),
        max_seq_length=workspace.length,
        dtype=torch.bfloat16,
        load_in_4bit=quant is not None,
        load_in_16bit=quant is None,
        use_gradient_checkpointing=mode,
        use_exact_model_name=True,
        fix_tokenizer=False,
    )
    model = FastLanguageModel.get_peft_model(model, use_gradient_checkpointing=mode, **weights.lora_options())
    weights.load_adapters(model, workspace.folder)
    FastLanguageModel.for_training(model, use_gradient_checkpointing=mode)
    return Prepared(model)


def _load_model(workspace: Workspace, checkpointing: bool = False) -> Any:
    model = weights.add_adapters(weights.load(workspace.folder, workspace.device), workspace.folder)
    if checkpointing:
        enable_checkpointing(model)
    return model


def enable_checkpointing(model: Any) -> None:
    """Enable gradient checkpointing with the options of transformers' Trainer."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _compile_layers(model: Any) -> None:
    for layer in model.get_base_model().model.layers:
        layer.compile()
