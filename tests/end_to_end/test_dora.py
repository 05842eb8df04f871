"""DoRA: each block is one graph, as with LoRA, and gradients equal eager's."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from tiny_models import batch, build, distance, double, relative, step

import fastlora


def dora(family: str = "llama", **options: Any) -> torch.nn.Module:
    return build(family, use_dora=True, **options)


@pytest.mark.parametrize("p", [0.0, 0.2])
def test_a_block_is_one_graph(p: float) -> None:
    reports = []
    for options in ({}, {"use_dora": True}):
        model = fastlora.compile(build("llama", dropout=p, **options).train())
        step(model, batch())
        reports.append(fastlora.report(model))
    assert reports[0].graphs == reports[1].graphs
    assert reports[1].breaks == []


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "gpt_neox"])
def test_gradients_equal_eager_and_every_site_is_fused(family: str, p: float) -> None:
    model = dora(family, dropout=p).train()
    expected = step(model, batch(padded=True))
    fastlora.compile(model, strict=True, verify=True)
    mine = step(model, batch(padded=True))
    assert relative(mine.loss, expected.loss) <= 1e-6
    assert mine.gradients.keys() == expected.gradients.keys()
    truth = step(double(fastlora.disable(model)), batch(padded=True))
    for name, gradient in expected.gradients.items():
        own = relative(gradient, truth.gradients[name]) if not p else 0.0
        assert relative(mine.gradients[name], gradient) <= max(2e-6, 2 * own), name


@pytest.mark.parametrize(("dtype", "autocast"), [(torch.bfloat16, None), (torch.float32, torch.bfloat16)])
def test_rounded_gradients_are_as_precise_as_eager(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    model = dora(dtype=dtype)
    exact, batches = double(model), [batch(seed=seed) for seed in range(6)]
    truths = [step(exact, inputs) for inputs in batches]
    eager = [step(model, inputs, autocast) for inputs in batches]
    fastlora.compile(model)
    compiled = [step(model, inputs, autocast) for inputs in batches]
    errors = [list(map(distance, steps, truths)) for steps in (compiled, eager)]
    assert statistics.median(a / b for a, b in zip(*errors, strict=True)) <= 1.25


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_with_the_same_masks(reentrant: bool) -> None:
    model = dora(dropout=0.2).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    expected = step(model, batch())
    mine = step(fastlora.compile(model, strict=True), batch())
    assert fastlora.report(model).coverage["lora"].fused == 42
    for name, gradient in expected.gradients.items():
        assert relative(mine.gradients[name], gradient) <= 4e-6, name


def test_disabling_restores_the_model() -> None:
    functions = dequantize_module_weight, transpose
    before = [dict(vars(function)) for function in functions]
    model = dora().eval()
    inputs = batch()
    with torch.no_grad():
        expected = model(**inputs).logits
    before_it = step(model, inputs)
    fastlora.compile(model)
    step(model, inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, expected)
    fastlora.disable(model)
    assert [dict(vars(function)) for function in functions] == before
    after_it = step(model, inputs)
    assert torch.equal(after_it.loss, before_it.loss)
    assert all(torch.equal(after_it.gradients[name], g) for name, g in before_it.gradients.items())
