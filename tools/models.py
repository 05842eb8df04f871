"""Loading a tokenizer and a model with LoRA adapters, the built-in ones or the user's."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from fastlora.tools.builtin_model import build_model, build_tokenizer
from fastlora.tools.errors import UsageError, one_line
from fastlora.tools.quantization import check_bitsandbytes, four_bit_config
from fastlora.tools.settings import Settings


def load_tokenizer(settings: Settings) -> Any:
    """Return a tokenizer that pads on the right; without a padding token, it pads with the end-of-text token."""
    if settings.model is None:
        return build_tokenizer()
    _check_path(settings.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(settings.model)
    except Exception as problem:  # the type depends on which file is damaged
        raise UsageError(f"--model {settings.model}: its tokenizer cannot be loaded ({one_line(problem)})") from problem
    tokenizer.padding_side = "right"
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UsageError(f"--model {settings.model}: its tokenizer has neither a padding nor an end-of-text token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(settings: Settings) -> PeftModel:
    """Return the model with new adapters, whose weights depend only on the settings."""
    base = _base_model(settings)
    limit = getattr(base.config, "max_position_embeddings", None)
    if limit is not None and settings.max_length > limit:
        raise UsageError(f"--max-length {settings.max_length}: {settings.model_name} supports at most {limit} tokens")
    if settings.gradient_checkpointing and not base.supports_gradient_checkpointing:
        raise UsageError(f"--gradient-checkpointing: {settings.model_name} does not support it; leave it out")
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    set_seed(settings.seed)
    try:
        return get_peft_model(base, lora)
    except ValueError as problem:
        reason = one_line(problem)
        raise UsageError(
            f"--model {settings.model_name}: has no linear layers, or none that PEFT can adapt ({reason})"
        ) from problem


def _base_model(settings: Settings) -> Any:
    """Return the model without adapters."""
    if not settings.load_in_4bit:
        return _load(settings)
    from peft import prepare_model_for_kbit_training

    check_bitsandbytes("--load-in-4bit")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return prepare_model_for_kbit_training(
        _load(settings, quantization_config=four_bit_config(_dtype(settings)), device_map=device),
        use_gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )


def _dtype(settings: Settings) -> torch.dtype:
    return torch.bfloat16 if settings.bf16 else torch.float32


def _load(settings: Settings, **options: Any) -> Any:
    if settings.bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        raise UsageError("--bf16: this GPU does not compute in bfloat16; leave it out")
    dtype = _dtype(settings)
    if settings.model is None:
        return _builtin_model(settings.seed, dtype, options)
    _check_path(settings.model)
    try:
        return AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, **options)
    except Exception as problem:  # the type depends on which file is missing or damaged
        raise UsageError(f"--model {settings.model}: cannot be loaded ({one_line(problem)})") from problem


def _builtin_model(seed: int, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    """Return the built-in model; with options of `from_pretrained`, it is saved and loaded."""
    model = build_model(seed).to(dtype)
    if not options:
        return model
    with tempfile.TemporaryDirectory(prefix="fastlora-") as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)


def _check_path(model: str) -> None:
    """Raise `UsageError` for a path that does not exist, which would otherwise be looked up on the hub."""
    path = Path(model)
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    if path.is_file() or (looks_local and not path.is_dir()):
        raise UsageError(
            f"--model {model}: no such folder; give the folder of a saved model or the name of a hub model"
        )
