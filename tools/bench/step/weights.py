"""The weights and the batch that all contenders share, and how they are loaded.

LoRA of rank 16 scaled by 32 / 16 on all seven linear layers of a block, without dropout. B is random, as it is not zero
after the first step and A would have no gradient. Adapters are float32, the base is bfloat16, all of it random. With a
quantisation, every contender has bitsandbytes make 4-bit weights of the same bfloat16 ones, quantised twice.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastlora.tools.bench.step.models import MODELS
from fastlora.tools.four_bits import four_bits

RANK, ALPHA = 16, 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIRST_TOKEN = 259
"""Tokens are drawn from here on: below are those of the tokenizer, whose padding some libraries treat specially."""
_B_SPREAD = 0.02
_MODEL, _ADAPTER, _QUANTISATION = "model", "adapter.safetensors", "quantisation"


def model_folder(folder: Path) -> Path:
    """Where the base model is, with a tokenizer, as some loaders insist on one."""
    return folder / _MODEL


def lora_options() -> dict[str, Any]:
    """What PEFT's LoraConfig, or a peer's spelling of it, is told."""
    return {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": 0.0, "bias": "none", "target_modules": list(TARGETS)}


def quantisation(folder: Path) -> str | None:
    """What the base model's weights are to be quantised to, if they are."""
    path = folder / _QUANTISATION
    return path.read_text() if path.exists() else None


def save(name: str, layers: int, folder: Path, device: torch.device, quant: str | None = None) -> None:
    """Draws a model and adapters for it, and saves both, with a note if the model is to be quantised."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from fastlora.tools.builtin_model import build_tokenizer

    if quant is not None:
        (folder / _QUANTISATION).write_text(quant)
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(MODELS[name].config(layers), dtype=torch.bfloat16)
    model.save_pretrained(model_folder(folder))
    build_tokenizer().save_pretrained(model_folder(folder))
    adapted = _with_adapters(model)
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=_B_SPREAD)
    state = {key: value.float().cpu().contiguous() for key, value in get_peft_model_state_dict(adapted).items()}
    save_file(state, folder / _ADAPTER)


def load(folder: Path, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The base model without adapters; quantised, if it is to be and `dtype` is bfloat16, else with the weights that
    then are decoded."""
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": dtype}
    quant = quantisation(folder)
    if quant is not None:
        options = {"dtype": torch.bfloat16, "quantization_config": four_bits(torch.bfloat16, quant)}
    model = AutoModelForCausalLM.from_pretrained(model_folder(folder), device_map=str(device), **options)
    return model if quant is None or dtype is torch.bfloat16 else model.dequantize(dtype).to(dtype)


def adapted(model: Any, folder: Path) -> Any:
    """The model with PEFT's adapters, which have the saved weights."""
    model = _with_adapters(model)
    load_adapters(model, folder)
    return model


def _with_adapters(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora_options()))


def load_adapters(model: Any, folder: Path) -> None:
    """Puts the saved weights into a model's adapters.

    Raises:
        ValueError: if they are not all there afterwards, in float32, and nothing else is trained.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    wanted = load_file(folder / _ADAPTER)
    set_peft_model_state_dict(model, wanted)
    found = get_peft_model_state_dict(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if len(trained) != len(wanted) or found.keys() != wanted.keys():
        raise ValueError(f"{len(trained)} tensors are trained, where the adapters are {len(wanted)}")
    for name, value in wanted.items():
        if found[name].dtype != torch.float32 or not torch.equal(found[name].cpu(), value):
            raise ValueError(f"{name} is not what was saved (it is {found[name].dtype}, on {found[name].device})")


def batch(vocabulary: int, rows: int, length: int, device: torch.device) -> dict[str, Any]:
    """Random tokens that are their own labels; without a mask, as no token is padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(FIRST_TOKEN, vocabulary, (rows, length), generator=generator).to(device)
    return {"input_ids": tokens, "labels": tokens.clone(), "use_cache": False}
