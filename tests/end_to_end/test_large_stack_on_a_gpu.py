"""A model of the size of Llama-3.1-70B, in 4 bits, trains on one GPU of 48 GB."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fastlora

GB = 10**9
CARD = 48 * GB
"""The memory of the card, of which the driver and the CUDA context take a few hundred megabytes."""
LAYERS, LENGTH = 80, 2048

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 60 * GB,
    reason="no GPU of 60 GB or more, on which to see how much is taken",
)


def stack() -> nn.Module:
    """Return a stack of layers with the same random weights, as drawing and quantizing all would take minutes."""
    from peft import LoraConfig, get_peft_model
    from quantized_models import Format
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256, hidden_size=8192, intermediate_size=28_672, num_hidden_layers=1,
        num_attention_heads=64, num_key_value_heads=8, max_position_embeddings=8192,
    )  # fmt: skip
    kept = Format(compute=torch.bfloat16, dtype=torch.bfloat16)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM._from_config(config, dtype=kept.dtype)
    layer = model.model.layers[0]
    for name, module in list(layer.named_modules()):
        if isinstance(module, nn.Linear):
            layer.set_submodule(name, kept.layer(module))
    model.model.layers = nn.ModuleList([layer, *(copy.deepcopy(layer) for _ in range(LAYERS - 1))])
    for i, each in enumerate(model.model.layers):
        each.self_attn.layer_idx = i
    model.config.num_hidden_layers = LAYERS
    model.is_loaded_in_4bit = True
    return get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))


def test_eighty_layers_of_a_70b_model_train_within_48_gigabytes() -> None:
    model = fastlora.compile(stack(), memory_budget=0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    tokens = torch.randint(3, 128_000, (1, LENGTH), device="cuda")
    losses = []
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    report = fastlora.report(model)
    assert report.coverage["lora"].fused == 7 * LAYERS
    peak = torch.cuda.max_memory_reserved()
    print(f"peak: {torch.cuda.max_memory_allocated() / GB:.1f} GB allocated, {peak / GB:.1f} GB reserved")
    assert peak < CARD - GB
