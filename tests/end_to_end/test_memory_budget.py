"""A memory budget changes what a step saves, and no bit of its results."""

from __future__ import annotations

import gc
from functools import cache

import pytest
import torch
from copies import LateCopies
from quantized_models import Format, decoded
from quantized_models import build as quantized
from tiny_models import Step, batch, build, step
from torch.testing._internal.two_tensor import TwoTensor

import fastlora
from fastlora.frontend import session
from fastlora.runtime import activation_offload, memory_budget

LAYERS = 3


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> LateCopies:
    """Offload tensors of any size, on the CPU."""
    streams = LateCopies()
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)
    monkeypatch.setattr(memory_budget, "MAX_PENDING", 0)
    monkeypatch.setattr(session, "CudaCopyStreams", lambda: streams)
    return streams


def assert_equal_steps(mine, plain) -> None:
    assert torch.equal(mine.loss, plain.loss)
    assert mine.gradients.keys() == plain.gradients.keys()
    for name, gradient in plain.gradients.items():
        assert torch.equal(mine.gradients[name], gradient), name


@cache
def plain_steps(family) -> list[Step]:
    """Return three steps of one batch without a budget."""
    model = fastlora.compile(build(family))
    return [step(model, batch()) for _ in range(3)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3", "bert"])
@pytest.mark.parametrize("budget", [0, "6KB", "1GB"])
def test_steps_are_bit_identical(copies, family, budget):
    mine = fastlora.compile(build(family), memory_budget=budget)
    for plain in plain_steps(family):
        assert_equal_steps(step(mine, batch()), plain)
    moved = [what for what, _ in copies.log]
    assert ("to_host" in moved and "to_device" in moved) or budget == "1GB"


def test_a_budget_changes_no_bit_of_dropout_or_accumulation(copies):
    found = []
    for budget in (None, 0):
        model = fastlora.compile(build("llama", dropout=0.3).train(), memory_budget=budget)
        torch.manual_seed(3)
        losses = [model(**batch(length=n)).loss for n in (7, 12, 7)]
        torch.stack(losses).sum().backward()  # three forwards before one backward
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for mine, plain in zip(*found, strict=True):
        assert torch.equal(mine, plain)


def test_a_large_budget_offloads_in_the_first_step_only(copies):
    model = fastlora.compile(build("llama"), memory_budget="1GB")
    step(model, batch())
    before = len(copies.log)
    assert before > 0
    step(model, batch())
    assert len(copies.log) == before
    assert not any("memory budget" in note for note in fastlora.report(model).notes)


def test_layers_over_budget_recompute_where_copies_are_slow(copies):
    given = batch()
    model = fastlora.compile(build("llama"), memory_budget=0)
    step(model, given)
    layer = model._compiled_call_impl.session.budget
    needs = max(layer._measured.values(), key=lambda each: each.saved)
    for ratio, words in (
        (1e9, "1 offloaded their activations to the host, and 0"),
        (0.0, "0 offloaded their activations to the host, and 1"),
    ):
        copies.ratio = ratio
        model = fastlora.compile(build("llama"), memory_budget=LAYERS * needs.saved - needs.recomputable // 2)
        for _ in range(2):
            step(model, given)
        assert any(words in note for note in fastlora.report(model).notes), fastlora.report(model).notes


def test_scales_of_quantized_weights_are_not_offloaded(copies):
    """They are larger than the activations of two tokens, and are inputs of the graph."""
    over_codes = quantized("llama", Format(nested=False))
    found = []
    for model in (decoded(over_codes), over_codes):
        fastlora.compile(model, memory_budget=0)
        step(model, batch(length=2, rows=1))
        needs = model._compiled_call_impl.session.budget._measured
        found.append(sorted(each.flops for each in needs.values() if each.flops))
    assert found[0] == found[1]


def test_on_a_cpu_recomputable_activations_are_recomputed():
    model = fastlora.compile(build("llama"), memory_budget=0)
    step(model, batch())
    assert any(f"{LAYERS + 1} recompute their widest activations" in note for note in fastlora.report(model).notes)


def test_a_budget_with_gradient_checkpointing_is_noted_as_unused(copies):
    given = batch()
    model = build("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    plain = step(model, given)
    mine = step(fastlora.compile(model, memory_budget=0), given)
    assert abs(mine.loss - plain.loss) < 1e-6
    assert any("gradient checkpointing" in note for note in fastlora.report(model).notes)


def test_weights_written_before_the_backward_raise():
    model = fastlora.compile(build("llama"), memory_budget=0)
    first, second = model(**batch()).loss, model(**batch(seed=1)).loss
    first.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


def test_forwards_without_backward_leak_no_memory():
    def alive() -> int:
        gc.collect()
        return sum(isinstance(each, torch.Tensor) for each in gc.get_objects())

    model = fastlora.compile(build("llama"), memory_budget=0)
    for _ in range(3):
        model(**batch())
    before = alive()
    for _ in range(3):
        model(**batch())
    assert alive() <= before


def test_storages_of_wrapper_subclass_weights_are_kept(copies):
    model = build("llama")
    layer = model.base_model.model.model.layers[1].mlp.gate_proj.base_layer
    weight = layer.weight.detach()
    layer.weight = torch.nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    plain = step(fastlora.compile(build("llama")), batch())
    mine = step(fastlora.compile(model, memory_budget=0), batch())
    assert abs(mine.loss - plain.loss) < 1e-6
    parts = {t.untyped_storage().data_ptr() for t in (layer.weight.a, layer.weight.b)}
    assert memory_budget._addresses([layer.weight]) == parts


def test_nothing_is_offloaded_where_hooks_are_disabled(copies):
    model = fastlora.compile(build("llama"), memory_budget=0)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        step(model, batch())
    assert copies.log == []
