"""Experts with LoRA on their parameters: gradients equal eager's, and unfused experts are reported with a reason."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_experts import EXPERTS, FAMILIES, GATED_OTHERWISE, LAYERS, PARAMETERS, build, fill, lora_of, one_by_one
from tiny_models import assert_equal, batch, distance, double, relative, step
from torch import nn

import fastlora

SITES = LAYERS * len(PARAMETERS)
bf16 = torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_eager_and_every_site_is_fused(family: str) -> None:
    model = build(family)
    expected = step(model, batch(padded=True))
    fastlora.compile(model, strict=family not in GATED_OTHERWISE, verify=True)
    assert_equal(step(model, batch(padded=True)), expected)
    assert len(expected.gradients) == 2 * SITES
    assert lora_of(model) == (SITES, SITES, [])
    report = fastlora.report(model)
    assert sum(site.count for site in report.fused if site.op == "lora_experts") == SITES
    assert report.breaks == []


@pytest.mark.parametrize("adapter", [torch.float32, bf16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_gradients_are_as_precise_as_eager(family: str, adapter: torch.dtype) -> None:
    """Medians are compared, as a token that rounding routes to another expert makes a large error."""
    model = build(family, dtype=bf16, adapter=adapter)
    exact, batches = one_by_one(double(model)), [batch(seed=seed) for seed in range(6)]
    truths = [step(exact, inputs) for inputs in batches]
    eager = [step(model, inputs) for inputs in batches]
    fastlora.compile(model, strict=family not in GATED_OTHERWISE)
    compiled = [step(model, inputs) for inputs in batches]
    errors = [list(map(distance, steps, truths)) for steps in (compiled, eager)]
    assert statistics.median(a / b for a, b in zip(*errors, strict=True)) <= 1.25


@pytest.mark.parametrize("dtype", [torch.float32, bf16], ids=str)
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_autocast_does_not_change_the_products_of_experts(family: str, dtype: torch.dtype) -> None:
    model = build(family, dtype=dtype, adapter=torch.float32)
    truth = step(one_by_one(double(model)), batch())
    expected = step(model, batch(), autocast=bf16)
    fastlora.compile(model, strict=family not in GATED_OTHERWISE, verify=True)
    mine = step(model, batch(), autocast=bf16)
    assert lora_of(model) == (SITES, SITES, [])
    assert distance(mine, truth) <= 1.25 * distance(expected, truth)
    assert relative(mine.loss, expected.loss) <= 1e-3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_checkpointed_experts_equal_eager(family: str, reentrant: bool) -> None:
    model = build(family).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    expected = step(model, batch())
    mine = step(fastlora.compile(model, strict=family not in GATED_OTHERWISE), batch())
    assert_equal(mine, expected)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_trained_experts_get_gradients(family: str) -> None:
    model = build(family)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name or "experts" in name)
    expected = step(model, batch())
    assert any(name.endswith("gate_up_proj") for name in expected.gradients)
    assert_equal(step(fastlora.compile(model, strict=family not in GATED_OTHERWISE), batch()), expected)


def test_adapters_on_layers_and_on_parameters_together() -> None:
    model = build("mixtral", target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    expected = step(model, batch())
    assert_equal(step(fastlora.compile(model, strict=True), batch()), expected)
    assert lora_of(model)[:2] == (SITES + 4 * LAYERS,) * 2


def test_an_adapter_on_one_of_two_parameters() -> None:
    model = build("qwen3_moe", target_parameters=["down_proj"])
    expected = step(model, batch())
    assert_equal(step(fastlora.compile(model, strict=True), batch()), expected)
    assert lora_of(model) == (LAYERS, LAYERS, [])


def test_sequence_lengths_may_change() -> None:
    model = fastlora.compile(build("mixtral"), strict=True)
    plain = build("mixtral")
    for length in (16, 9, 12, 7):
        assert_equal(step(model, batch(length)), step(plain, batch(length)))


def test_expert_parallel_models_skip_tokens_of_other_devices() -> None:
    """Such tokens come last, and belong to no group."""
    model = build("mixtral")
    spread = [module for module in model.modules() if hasattr(module, "_is_expert_parallel")]
    if not spread:
        pytest.skip("this transformers does not spread experts over devices so")
    for module in spread:
        module._is_expert_parallel, module.num_experts = True, EXPERTS - 1
        for name in PARAMETERS:
            setattr(module, name, nn.Parameter(getattr(module, name)[:-1], requires_grad=False))
    for module in model.modules():
        if hasattr(module, "parameter_name"):
            module.num_experts = EXPERTS - 1
            a, b = module.lora_A["default"], module.lora_B["default"]
            a.weight, b.weight = nn.Parameter(a.weight[:-2].clone()), nn.Parameter(b.weight[:, :-2].clone())
    expected = step(model, batch())
    assert all(gradient.isfinite().all() for gradient in expected.gradients.values())
    fastlora.compile(model, strict=True)
    assert_equal(step(model, batch()), expected)
    assert lora_of(model) == (SITES, SITES, [])


def test_nothing_as_large_as_the_weights_is_saved() -> None:
    """Eager saves the sum of weight and adapter, except for the first layer, whose input requires no gradient."""
    model = build("mixtral")
    weights = [p for name, p in model.named_parameters() if name.endswith(tuple(PARAMETERS))]
    sizes, own = {p.numel() for p in weights}, {p.data_ptr() for p in weights}
    assert len(weights) == SITES

    def kept() -> int:
        found: set[int] = set()

        def pack(t: torch.Tensor) -> torch.Tensor:
            if t.numel() in sizes and t.data_ptr() not in own:
                found.add(t.data_ptr())
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(**batch()).loss
        loss.backward()
        return len(found)

    assert kept() == SITES - 1
    fastlora.compile(model)
    step(model, batch())
    assert kept() == 0


def two(model: Any) -> Any:
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=[], target_parameters=PARAMETERS))
    model.base_model.set_adapter(["default", "second"])
    fill(model)
    return model


@pytest.mark.parametrize(
    ("implementation", "prepare", "seen", "reason"),
    [
        ("batched_mm", lambda model: model, SITES, "each token, or each expert, takes its matrix out of"),
        (
            "eager",
            lambda model: model,
            len(PARAMETERS),
            "leaves the graph before a product reads it, as where experts run",
        ),
        ("grouped_mm", two, SITES, "several adapters are active on one parameter"),
    ],
    ids=["batched", "loop", "two adapters"],
)
def test_unfused_experts_are_reported_with_a_reason(implementation: str, prepare: Any, seen: int, reason: str) -> None:
    """In a loop over experts, PEFT's frame runs, and is traced, for each parameter of a layer."""
    model = prepare(build("mixtral", implementation))
    expected = step(model, batch())
    fastlora.compile(model)
    assert_equal(step(model, batch()), expected)
    found = lora_of(model)
    assert found[:2] == (seen, 0)
    assert found[2]
    assert all(reason in each for each in found[2])


def test_disabling_restores_the_eager_experts() -> None:
    model = build("gpt_oss")
    before = step(model, batch())
    step(fastlora.compile(model), batch())
    after = step(fastlora.disable(model), batch())
    assert torch.equal(after.loss, before.loss)
    assert all(torch.equal(after.gradients[name], g) for name, g in before.gradients.items())
