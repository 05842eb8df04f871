"""The least work of a step, counted a second way; and the models that it is counted for."""

from __future__ import annotations

import pytest
import torch

from fastlora.tools.bench.step.limit import limit, parts, trained_weights
from fastlora.tools.bench.step.models import MODELS
from fastlora.tools.bench.step.weights import RANK, lora_options

PUBLISHED = {
    "Llama-3.1-8B": 8_030_261_248,
    "Qwen2.5-7B": 7_615_616_512,
    "Gemma-2-9B": 9_241_705_984,
    "Qwen3-8B": 8_190_735_360,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_model_has_the_weights_that_its_publisher_counts(name: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = MODELS[name]
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(model.config(model.layers), dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in made.parameters()) == PUBLISHED[name]
    adapted = get_peft_model(made, LoraConfig(**lora_options()))
    assert adapted.get_nb_trainable_parameters()[0] == trained_weights(model, model.layers)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_products_are_those_of_frozen_weights_and_adapters(layers: int) -> None:
    """Each weight is met once forward and once for dX, each adapter's three times; not the first layer's dX."""
    tokens, model = 40, MODELS["tiny"]
    hidden, inner, qkv = 64, 192, 64 + 2 * 32
    block = hidden * qkv + hidden * hidden + 3 * hidden * inner
    adapters = trained_weights(model, layers)
    first = hidden * qkv + 3 * RANK * hidden
    expected = 2 * tokens * (2 * layers * block + 3 * adapters - first)
    products = [part for part in parts(model, layers, tokens) if part.name.endswith(("forward", "backward"))]
    assert sum(part.times * part.flops for part in products) == pytest.approx(expected)
    (head,) = {part.flops for part in parts(model, layers, tokens) if part.name == "head and loss"}
    assert head == 2 * tokens * hidden * 512


def test_norms_are_counted_where_a_model_has_them() -> None:
    tokens, layers, size = 1 << 16, 2, 2
    add, norm = 8, 5  # rows read and written, forward and backward; beside so many, weights are little

    def norms(name: str) -> float:
        found = [part for part in parts(MODELS[name], layers, tokens) if part.name == "norms"]
        return sum(part.times * part.moved for part in found) / (tokens * size)

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
    # The products and attention alone were measured at 207 ms by a step written by hand.
    small = sum(found["parts"][name] for name in ("norms", "rotary", "GLU", "embedding", "optimizer"))
    assert found["seconds"] - small == pytest.approx(0.207, rel=0.03)


def test_quantised_weights_are_decoded_once_each_way() -> None:
    layers, weights = 3, 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 192
    plain, quantised = (list(parts(MODELS["tiny"], layers, 40, quantised)) for quantised in (False, True))
    decoded = [part for part in quantised if part.name.endswith("decoded")]
    assert len(quantised) - len(plain) == len(decoded)
    assert sum(part.times * part.moved for part in decoded) == 2 * layers * weights * (2 + 1 / 2 + 1 / 64)
