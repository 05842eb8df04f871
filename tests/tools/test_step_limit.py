"""The least time of a step against independent counts, and the sizes of the models."""

from __future__ import annotations

import pytest
import torch

from fastlora.tools.bench.step.limit import limit, num_trained_weights, parts
from fastlora.tools.bench.step.models import MODELS
from fastlora.tools.bench.step.weights import RANK, lora_options

PUBLISHED = {
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen2.5-7B": 7_615_616_512,
    "Gemma-2-9B": 9_241_705_984,
    "Qwen3-8B": 8_190_735_360,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_the_published_number_of_parameters(name: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = MODELS[name]
    with torch.device("meta"):
        model_on_meta = AutoModelForCausalLM.from_config(model.config(model.layers), dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model_on_meta.parameters()) == PUBLISHED[name]
    adapted = get_peft_model(model_on_meta, LoraConfig(**lora_options()))
    assert adapted.get_nb_trainable_parameters()[0] == num_trained_weights(model, model.layers)


@pytest.mark.parametrize("layers", [1, 3])
def test_products_count_frozen_weights_and_adapters(layers: int) -> None:
    """Frozen weights count for the forward and dX, adapters also for their own gradient; the first layer has no dX."""
    tokens, model = 40, MODELS["tiny"]
    hidden, inner, qkv = 64, 192, 64 + 2 * 32
    block = hidden * qkv + hidden * hidden + 3 * hidden * inner
    adapters = num_trained_weights(model, layers)
    first = hidden * qkv + 3 * RANK * hidden
    expected = 2 * tokens * (2 * layers * block + 3 * adapters - first)
    products = [part for part in parts(model, layers, tokens) if part.name.endswith(("forward", "backward"))]
    assert sum(part.times * part.flops for part in products) == pytest.approx(expected)
    (head,) = {part.flops for part in parts(model, layers, tokens) if part.name == "head and loss"}
    assert head == 2 * tokens * hidden * 512


def test_norms_are_counted_as_in_each_architecture() -> None:
    tokens, layers, size = 1 << 16, 2, 2
    add, norm = 8, 5  # reads and writes of rows in both passes; norm weights are negligible

    def norms(name: str) -> float:
        found = [part for part in parts(MODELS[name], layers, tokens) if part.name == "norms"]
        return sum(part.times * part.num_bytes for part in found) / (tokens * size)

    llama = 4096 * (2 + 2 * layers * add)
    assert norms("Llama-3.1-8B") == pytest.approx(llama, rel=1e-2)
    heads = 128 * 40 * layers * norm
    assert norms("Qwen3-8B") == pytest.approx(llama + heads, rel=1e-2)
    gemma = 3584 * (2 + 2 * layers * (add + norm))
    assert norms("Gemma-2-9B") == pytest.approx(gemma, rel=1e-2)


def test_the_limit_is_the_sum_of_its_parts() -> None:
    measured = {
        "bandwidth": 4.27e12,
        "rate": 7e14,
        "batches": [[1, 512], [4, 2048]],
        "attention": [{"backend": "none"}, {"backend": "cuDNN", "forward": 2.5e-4, "backward": 7.2e-4}],
    }
    found = limit(MODELS["Llama-3.1-8B"], 16, 4, 2048, measured)
    assert found["attention_backend"] == "cuDNN"
    assert found["parts"]["attention"] == pytest.approx(16 * 9.7e-4)
    assert found["seconds"] == pytest.approx(sum(found["parts"].values()))
    # A hand-written step of products and attention alone takes 207 ms.
    small = sum(found["parts"][name] for name in ("norms", "rotary", "GLU", "embedding", "optimizer"))
    assert found["seconds"] - small == pytest.approx(0.207, rel=0.03)


def test_quantized_weights_are_dequantized_once_per_pass() -> None:
    layers, weights = 3, 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 192
    plain, quantized = (list(parts(MODELS["tiny"], layers, 40, quantized)) for quantized in (False, True))
    decoded = [part for part in quantized if part.name.endswith("decoded")]
    assert len(quantized) - len(plain) == len(decoded)
    assert sum(part.times * part.num_bytes for part in decoded) == 2 * layers * weights * (2 + 1 / 2 + 1 / 64)
