"""Experts with LoRA on their parameters on a GPU, in bfloat16 against a float64 step."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from tiny_experts import FAMILIES, GATED_OTHERWISE, LAYERS, PARAMETERS, build, lora_of, one_by_one
from tiny_models import batch, distance, double, relative, step

import fastlora

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="these compute on a GPU")
SITES = LAYERS * len(PARAMETERS)


def on_gpu(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: t.cuda() for name, t in inputs.items()}


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_as_accurate_as_eagers(family: str, adapter: torch.dtype) -> None:
    """Medians are compared, as a token that rounding routes to another expert makes a large error."""
    eager = build(family, dtype=torch.bfloat16, adapter=adapter).cuda()
    model = fastlora.compile(copy.deepcopy(eager), strict=family not in GATED_OTHERWISE)
    exact = one_by_one(double(copy.deepcopy(eager)))
    ratios = []
    for seed in range(6):
        inputs = on_gpu(batch(seed=seed))
        truth = step(exact, inputs)
        ratios.append(distance(step(model, inputs), truth) / distance(step(eager, inputs), truth))
    assert statistics.median(ratios) <= 1.25
    assert lora_of(model)[1:] == (SITES, [])


@pytest.mark.parametrize("mode", ["reduce-overhead", "no-cudagraphs"])
def test_a_model_trains_like_eager(mode: str) -> None:
    eager = build("mixtral", dtype=torch.bfloat16, adapter=torch.float32).cuda()
    model = fastlora.compile(copy.deepcopy(eager), mode=mode)
    losses = []
    for trained in (eager, model):
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], lr=1e-3)
        for i in range(12):
            losses.append(trained(**on_gpu(batch(seed=i % 3))).loss)
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    expected, found = torch.stack(losses).detach().float().chunk(2)
    assert torch.allclose(found, expected, rtol=2e-2)
    assert lora_of(model)[1:] == (SITES, [])


def test_products_that_would_synchronize_are_not_fused() -> None:
    model = build("mixtral").cuda()
    inputs = on_gpu(batch())
    expected = step(model, inputs)
    found = step(fastlora.compile(model), inputs)
    assert relative(found.loss, expected.loss) <= 1e-5
    assert all(relative(found.gradients[name], g) <= 1e-4 for name, g in expected.gradients.items())
    assert lora_of(model)[1:] == (0, ["on a cuda device grouped products require bfloat16"] * SITES)
