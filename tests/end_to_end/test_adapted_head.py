"""A head with an adapter: its loss never computes the logits, and gradients equal eager's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
from tiny_models import Step, assert_equal, batch, double, relative, step
from torch import nn

import fastlora
from fastlora.logits.deferred_logits import DeferredLogits


def build(family: str = "llama", dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    return tiny_models.build(family, dtype, target_modules=["q_proj", "lm_head"], **lora)


def loss_of(model: nn.Module) -> tuple[int, int]:
    coverage = fastlora.report(model).coverage.get("loss")
    return (0, 0) if coverage is None else (coverage.seen, coverage.fused)


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_the_loss_is_fused_with_soft_caps_and_logit_scales_too(family: str) -> None:
    model = build(family)
    expected = step(model, batch(padded=True))
    fastlora.compile(model)
    assert_equal(step(model, batch(padded=True)), expected)
    assert loss_of(model) == (1, 1)
    assert any("lm_head" in name for name in expected.gradients)
    assert isinstance(model(**batch()).logits, DeferredLogits)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_rounded_gradients_are_as_precise_as_eager(autocast: torch.dtype | None) -> None:
    eager = build(dtype=torch.float32 if autocast else torch.bfloat16)
    truth = double(copy.deepcopy(eager))
    model = fastlora.compile(copy.deepcopy(eager))
    errors = []
    for seed in range(8):
        exact, mine, its = (
            step(truth, batch(seed=seed)),
            *(step(m, batch(seed=seed), autocast=autocast) for m in (model, eager)),
        )
        errors.append([sum(relative(s.gradients[n], g) ** 2 for n, g in exact.gradients.items()) for s in (mine, its)])
    ours, eagers = (sum(column) for column in zip(*errors, strict=True))
    assert ours**0.5 <= 1.25 * eagers**0.5
    assert loss_of(model) == (1, 1)


def test_explain_counts_the_adapted_heads_loss() -> None:
    assert fastlora.explain(build(), **batch()).coverage["loss"].fused == 1


def test_logits_that_are_read_are_eagers_with_their_gradients() -> None:
    eager = build()
    model = fastlora.compile(copy.deepcopy(eager))
    steps = []
    for each in (eager, model):
        logits = each(**batch()).logits
        logits.log_softmax(-1)[..., 3].sum().backward()
        gradients = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        steps.append(Step(logits.detach() + 0, gradients))
    assert_equal(steps[1], steps[0])


def test_the_heads_adapter_trains_above_a_frozen_layer() -> None:
    model = build()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name and "lm_head" in name)
    expected = step(model, batch())
    assert_equal(step(fastlora.compile(model), batch()), expected)
    assert loss_of(model) == (1, 1)


def test_reading_old_logits_after_a_step_raises() -> None:
    model = fastlora.compile(build())
    outputs = model(**batch())
    outputs.loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    with pytest.raises(fastlora.FastLoRAError, match="modified in place"):
        outputs.logits.sum()


@pytest.mark.parametrize("lora", [{"dropout": 0.5}, {"lora_bias": True}], ids=str)
def test_unsupported_adapters_run_unfused(lora: dict[str, Any]) -> None:
    model = build(**lora)
    expected = step(model, batch())
    fastlora.compile(model)
    assert_equal(step(model, batch()), expected)
    assert not isinstance(model(**batch()).logits, DeferredLogits)


def test_adapters_can_be_disabled_and_evaluated() -> None:
    eager = build()
    model = fastlora.compile(copy.deepcopy(eager))
    for prepare in (lambda m: m.disable_adapter(), lambda _: torch.no_grad()):
        with prepare(eager):
            expected = eager(**batch())
        with prepare(model):
            found = model(**batch())
        assert relative(found.loss, expected.loss) <= 5e-6
        assert relative(found.logits + 0, expected.logits) <= 5e-6
