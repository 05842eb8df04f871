"""Tiny LoRA models with random weights, training steps on them, and comparisons of steps."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

COMMON = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,  # well conditioned: at 0.02 eager fp32 gradients are themselves 2e-6 away from fp64
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ENCODER = {key: value for key, value in COMMON.items() if key != "num_key_value_heads"}
FAMILIES = {
    "llama": ("LlamaForCausalLM", COMMON),
    "qwen2": ("Qwen2ForCausalLM", COMMON),
    "qwen3": ("Qwen3ForCausalLM", {**COMMON, "head_dim": 8}),
    "mistral": ("MistralForCausalLM", COMMON),
    "gemma": ("GemmaForCausalLM", {**COMMON, "head_dim": 8}),
    "gemma2": ("Gemma2ForCausalLM", {**COMMON, "head_dim": 8, "sliding_window": 8}),
    "gemma3": ("Gemma3ForCausalLM", {**COMMON, "head_dim": 8, "sliding_window": 8}),
    "phi3": ("Phi3ForCausalLM", COMMON),
    "granite": ("GraniteForCausalLM", {**COMMON, "logits_scaling": 2.0, "residual_multiplier": 0.5}),
    "olmo2": ("Olmo2ForCausalLM", COMMON),
    "gpt_neox": ("GPTNeoXForCausalLM", {**ENCODER, "rotary_pct": 0.5}),
    "bert": ("BertForMaskedLM", {**ENCODER, "num_hidden_layers": 2}),
}
LLAMA_LIKE = [name for name in FAMILIES if name not in ("gpt_neox", "bert")]


def build(
    family: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0, seed: int = 0, **lora: object
) -> nn.Module:
    """Build a PEFT model with float32 adapters, by default on all linear layers; B is not zero, so no gradient is."""
    import transformers

    name, settings = FAMILIES[family]
    model_class = getattr(transformers, name)
    torch.manual_seed(seed)
    config = model_class.config_class(**settings)
    for key in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, key):
            setattr(config, key, 0.0)
    model = model_class(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            model,
            LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": dropout, **lora}),
        )
    model.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            parameter.data = parameter.data.float()
        if "lora_B" in parameter_name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def batch(length: int = 16, rows: int = 2, padded: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 128, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    if padded:
        ids[0, length - 5 :], mask[0, length - 5 :], labels[0, length - 5 :] = 0, 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@dataclass
class Step:
    """One training step: its loss, and the gradient of every trainable parameter."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def step(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    autocast: torch.dtype | None = None,
    seed: int = 0,
    device: str = "cpu",
) -> Step:
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast(device, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(**inputs).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Step(loss.detach(), gradients)


def relative(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the distance of two tensors, relative to the norm of the second."""
    actual, truth = actual.detach().double(), truth.detach().double()
    return float((actual - truth).norm() / truth.norm().clamp_min(1e-30))


def distance(found: Step, truth: Step) -> float:
    """Return the distance of all gradients together, relative to their norm in `truth`."""
    pairs = [(found.gradients[name].double(), g.double()) for name, g in truth.gradients.items()]
    error = sum(float((actual - expected).square().sum()) for actual, expected in pairs)
    return float((error / sum(float(expected.square().sum()) for _, expected in pairs)) ** 0.5)


def assert_equal(actual: Step, expected: Step) -> None:
    """Assert that two float32 steps are equal up to the order of sums."""
    assert relative(actual.loss, expected.loss) <= 1e-6
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert relative(actual.gradients[name], gradient) <= 5e-6, name


def double(model: nn.Module) -> nn.Module:
    """Return a copy in float64, as the truth to measure rounding errors against."""
    return copy.deepcopy(model).double()
