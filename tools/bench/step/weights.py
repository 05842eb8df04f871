"""The weights and batches that all contenders share.

LoRA has rank 16 and scaling 32 / 16, on all seven linear layers of a block, without dropout. All weights are random:
the base model in bfloat16, the adapters in float32. B is not zero, because then A would have no gradient. With
quantization, bitsandbytes quantizes the same bfloat16 weights for every contender, with double quantization.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastlora.tools.bench.step.models import MODELS
from fastlora.tools.quantization import four_bit_config

RANK, ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIRST_TOKEN = 259
"""Least token in batches. Smaller ones belong to the tokenizer, whose padding token some libraries treat specially."""
_B_STD = 0.02
_MODEL, _ADAPTER, _QUANTIZATION = "model", "adapter.safetensors", "quantization"


def model_folder(folder: Path) -> Path:
    """Return the folder of the base model, with a tokenizer, which some loaders require."""
    return folder / _MODEL


def lora_options() -> dict[str, Any]:
    """Return the options of PEFT's LoraConfig, which other libraries share."""
    return {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "bias": "none", "target_modules": list(TARGETS)}


def quantization(folder: Path) -> str | None:
    """Return the 4-bit format for the base model's weights, or None for bfloat16."""
    path = folder / _QUANTIZATION
    return path.read_text() if path.exists() else None


def save(name: str, layers: int, folder: Path, device: torch.device, quant: str | None = None) -> None:
    """Save a random model, random adapters, and the 4-bit format to load the model in."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from fastlora.tools.builtin_model import build_tokenizer

    if quant is not None:
        (folder / _QUANTIZATION).write_text(quant)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(MODELS[name].config(layers), dtype=torch.bfloat16)
    model.save_pretrained(model_folder(folder))
    build_tokenizer().save_pretrained(model_folder(folder))
    peft_model = _with_adapters(model)
    with torch.no_grad():
        for parameter_name, parameter in peft_model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=_B_STD)
    state = {key: value.float().cpu().contiguous() for key, value in get_peft_model_state_dict(peft_model).items()}
    save_file(state, folder / _ADAPTER)


def load(folder: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Load the base model without adapters. If a 4-bit format was saved, it is quantized for bfloat16, and has the
    dequantized weights for other dtypes."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype}
    quant = quantization(folder)
    if quant is not None:
        options = {"dtype": torch.bfloat16, "quantization_config": four_bit_config(torch.bfloat16, quant)}
    model = AutoModelForCausalLM.from_pretrained(model_folder(folder), device_map=str(device), **options)
    return model if quant is None or dtype is torch.bfloat16 else model.dequantize(dtype).to(dtype)


def add_adapters(model: Any, folder: Path) -> Any:
    """Return the model with PEFT's adapters, loaded with the saved weights."""
    model = _with_adapters(model)
    load_adapters(model, folder)
    return model


def _with_adapters(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora_options()))


def load_adapters(model: Any, folder: Path) -> None:
    """Load the saved weights into a model's adapters.

    Raises:
        ValueError: if the adapters then differ from the saved weights, or other parameters require gradients.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(folder / _ADAPTER)
    set_peft_model_state_dict(model, saved)
    found = get_peft_model_state_dict(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if len(trained) != len(saved) or found.keys() != saved.keys():
        raise ValueError(f"{len(trained)} parameters require gradients, but {len(saved)} adapter weights were saved")
    for name, value in saved.items():
        if found[name].dtype != torch.float32 or not torch.equal(found[name].cpu(), value):
            raise ValueError(
                f"{name} differs from the saved weight (it is {found[name].dtype}, on {found[name].device})"
            )


def make_batch(vocabulary: int, rows: int, length: int, device: torch.device) -> dict[str, Any]:
    """Return random tokens with themselves as labels. There is no attention mask, as there is no padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(FIRST_TOKEN, vocabulary, (rows, length), generator=generator).to(device)
    return {"input_ids": tokens, "labels": tokens.clone(), "use_cache": False}
