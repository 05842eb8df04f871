"""Tiny mixtures of experts with LoRA on the experts' parameters."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tiny_models import COMMON
from torch import nn

import fastlora

LAYERS, EXPERTS = 2, 4
PARAMETERS = ["gate_up_proj", "down_proj"]
_COMMON = {**COMMON, "num_hidden_layers": LAYERS, "num_experts_per_tok": 2}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralForCausalLM", {"num_local_experts": EXPERTS}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"num_experts": EXPERTS, "moe_intermediate_size": 24, "head_dim": 8}),
    "olmoe": ("OlmoeForCausalLM", {"num_experts": EXPERTS, "intermediate_size": 24}),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": 24,
            "num_key_value_heads": 4,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 0,
            **_LATENT,
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        {
            "num_local_experts": EXPERTS,
            "intermediate_size": 24,
            "head_dim": 8,
            "layer_types": ["full_attention"] * LAYERS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}
"""gpt_oss has biases, transposed matrices, and interleaved gate and up."""

GATED_OTHERWISE = {"gpt_oss"}
"""Families with a gated unit that no rule covers, for which strict=True would raise."""


def build(
    family: str,
    implementation: str = "grouped_mm",
    dtype: torch.dtype = torch.float32,
    adapter: torch.dtype | None = None,
    seed: int = 0,
    **lora: Any,
) -> Any:
    """Build a PEFT model with adapters of dtype `adapter` on the parameters of its experts, B not zero."""
    import transformers

    name, settings = FAMILIES[family]
    model_class = getattr(transformers, name)
    torch.manual_seed(seed)
    model = model_class(model_class.config_class(**{**_COMMON, **settings}))
    model.set_experts_implementation(implementation)
    options = {"r": 2, "lora_alpha": 5, "target_modules": [], "target_parameters": PARAMETERS, **lora}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(**options))
    model.to(dtype)
    fill(model, seed)
    for parameter in adapters(model).values():
        parameter.data = parameter.data.to(adapter or dtype)
    return model


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if "lora_" in name}


def fill(model: nn.Module, seed: int = 0) -> None:
    """Set every B to random values."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapters(model).items():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)


def one_by_one(model: Any) -> Any:
    """Have the model run its experts in a loop, which supports all dtypes, and return it."""
    model.get_base_model().set_experts_implementation("eager")
    return model


def lora_of(model: nn.Module) -> tuple[int, int, list[str]]:
    """Return the numbers of LoRA candidates and of fused ones, and the reasons why others are not fused."""
    report = fastlora.report(model)
    coverage = report.coverage["lora"]
    return coverage.seen, coverage.fused, [miss.reason for miss in report.missed if miss.op == "lora"]
