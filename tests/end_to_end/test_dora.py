"""DoRA: a block is one graph, as with LoRA, and gradients are eager's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from tiny_models import batch, build, step

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


def test_a_compiled_model_leaves_no_trace_of_itself() -> None:
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
