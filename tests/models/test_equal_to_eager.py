"""Loss and all adapter gradients equal eager's, for all model families and modes of training."""

import random
from collections import Counter
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from tiny_models import FAMILIES, LLAMA_LIKE, Step, batch, build, double, relative, step
from torch import nn

import fastlora

FLOAT32 = 1e-6
SLACK = 1.25
SEEDS = 16
LOSS_SEEDS = 64
SHAPES = 20
SHAPED_LIKE_LLAMA = ("mistral", "qwen2", "gemma", "granite")
"""Families whose graphs depend on shapes as those of Llama do: they differ in biases, constants and norm offsets."""


def assert_equal_in_float32(model, found, eager, inputs) -> None:
    """Allow a relative distance of 1e-6, or eager's own distance from float64 if that is larger."""
    assert found.gradients.keys() == eager.gradients.keys()
    assert relative(found.loss, eager.loss) <= FLOAT32
    distances = {name: relative(found.gradients[name], eager.gradients[name]) for name in eager.gradients}
    far = [name for name, distance in distances.items() if distance > FLOAT32]
    if far:
        truth = step(double(fastlora.disable(model)), inputs)
        for name in far:
            assert distances[name] <= relative(eager.gradients[name], truth.gradients[name]), name


@pytest.mark.parametrize("mode", ["train", "eval", "padded, verified", "checkpointing", "dropout"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_step_equals_eager(family, mode):
    run = _train(family) if mode == "train" else _run(family, mode)
    report = run.report
    assert report.coverage["lora"].fused == report.coverage["lora"].seen > 0
    assert not [miss for miss in report.missed if miss.reason.startswith("verification")]
    assert_equal_in_float32(run.model, run.found, run.eager, run.inputs)


@dataclass
class Run:
    """A step of a compiled model, and the same step of the model before."""

    model: nn.Module
    inputs: dict[str, torch.Tensor]
    eager: Step
    found: Step
    report: fastlora.Report


def _run(family, mode) -> Run:
    model = build(family, dropout=0.1 if mode == "dropout" else 0.0)
    if mode == "eval":
        model.eval()
    if mode == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    inputs = batch(padded="padded" in mode)
    eager = step(model, inputs)
    fastlora.compile(model, verify="verified" in mode)
    found = step(model, inputs)
    return Run(model, inputs, eager, found, fastlora.report(model))


@cache
def _train(family) -> Run:
    """Run one plain training step, whose report other tests read as well."""
    return _run(family, "train")


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_dropout_recomputes_the_same_masks(family):
    model = build(family, dropout=0.1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    eager = step(model, batch())
    found = step(fastlora.compile(model), batch())
    assert all(relative(found.gradients[name], eager.gradients[name]) < 5e-6 for name in eager.gradients)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_neox", "bert"])  # these have different masks
def test_new_lengths_cause_at_most_one_recompilation(family):
    model = build(family)
    lengths = [batch(16), batch(24), batch(20), batch(13)]
    eager = [step(model, inputs) for inputs in lengths]
    fastlora.compile(model)
    graphs = []
    for inputs, expected in zip(lengths, eager, strict=True):
        found = step(model, inputs)
        graphs.append(fastlora.report(model).graphs)
        assert relative(found.loss, expected.loss) <= FLOAT32
        assert max(relative(found.gradients[n], expected.gradients[n]) for n in expected.gradients) < 3 * FLOAT32
    assert graphs[1] == graphs[2] == graphs[3]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in SHAPED_LIKE_LLAMA])
def test_changing_shapes_compile_each_region_at_most_twice(family):
    """For lengths beyond the sliding window of 8, up to which there is no mask."""
    model, eager = fastlora.compile(build(family)), build(family)
    shapes = random.Random(0).choices([(rows, length) for rows in range(1, 7) for length in range(9, 40)], k=SHAPES)
    shapes[SHAPES // 2] = (1, 17)
    compiled = {}
    for i, (rows, length) in enumerate(shapes):
        inputs = batch(length, rows)
        found = step(model, inputs)
        if i % 5 == 1:
            expected = step(eager, inputs)
            assert max(relative(found.gradients[n], expected.gradients[n]) for n in expected.gradients) < 5e-6
        graphs = model._compiled_call_impl.session.graphs
        compiled = Counter(graph.name for graph in graphs)
        assert max(compiled.values()) <= 2, (compiled, shapes[: i + 1])
    fused = {name: each.fused for name, each in fastlora.report(model).coverage.items()}
    assert fused == {name: each.fused for name, each in _train(family).report.coverage.items()}


@pytest.mark.parametrize("mode", ["bf16 base, fp32 adapters", "autocast, fp32 adapters"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_precise_as_eager(family, mode):
    """Root mean square over seeds, since for a single batch either may be more precise by chance."""
    autocast = torch.bfloat16 if mode.startswith("autocast") else None
    model = build(family, torch.float32 if autocast else torch.bfloat16)
    exact = double(model)
    inputs = [batch(seed=seed) for seed in range(LOSS_SEEDS)]
    truth, true_losses = steps_and_losses(exact, inputs)
    eager, eager_losses = steps_and_losses(model, inputs, autocast)
    fastlora.compile(model)
    found, found_losses = steps_and_losses(model, inputs, autocast)
    floor = torch.finfo(eager_losses[0].dtype).eps / 4
    assert rms(found_losses, true_losses) <= SLACK * rms(eager_losses, true_losses) + floor
    for name in truth[0].gradients:
        mine, its, true = ([each.gradients[name] for each in steps] for steps in (found, eager, truth))
        assert rms(mine, true) <= SLACK * rms(its, true), name


def steps_and_losses(model, inputs, autocast=None) -> tuple[list[Step], list[torch.Tensor]]:
    """Return the first step of each batch, and the losses of all steps; later steps run no backward."""
    steps = [step(model, each, autocast) for each in inputs[:SEEDS]]
    losses = [each.loss for each in steps]
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        losses += [model(**each).loss.detach() for each in inputs[SEEDS:]]
    return steps, losses


def rms(found, truth) -> float:
    """Return the root mean square of the relative distances."""
    return (sum(relative(mine, true) ** 2 for mine, true in zip(found, truth, strict=True)) / len(truth)) ** 0.5


@pytest.mark.parametrize("family", LLAMA_LIKE)
def test_every_candidate_of_a_llama_like_model_is_fused(family):
    assert _train(family).report.missed == []
    for name in ("lora", "norm", "rotary", "glu", "loss"):
        coverage = _train(family).report.coverage[name]
        assert coverage.seen == coverage.fused > 0, name


@pytest.mark.parametrize("family", ["gpt_neox", "bert"])
def test_adapters_norms_and_loss_of_other_models_are_fused(family):
    assert _train(family).report.missed == []
    for name in ("lora", "norm", "loss"):
        coverage = _train(family).report.coverage[name]
        assert coverage.seen == coverage.fused > 0, name
