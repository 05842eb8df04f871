"""Graphs of output head and cross-entropy, as in models and trainers, are fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import analyse, assert_as_exact, bf16, f32, randn
from torch import Tensor

V, H = 40, 16
LABELS = torch.tensor([[1, 39, -100], [0, -100, 7]])

Loss = Callable[..., Tensor]

VARIANTS: dict[str, Loss] = {
    "transformers": lambda x, w, t: F.cross_entropy(F.linear(x, w).float().view(-1, V), t.view(-1), reduction="mean"),
    "by matrices": lambda x, w, t: F.cross_entropy((x @ w.T).reshape(-1, V), t.reshape(-1)),
    "keywords": lambda x, w, t: F.cross_entropy(input=F.linear(x, w).view(-1, V), target=t.view(-1), ignore_index=-100),
    "contiguous": lambda x, w, t: F.cross_entropy(F.linear(x, w).contiguous().view(-1, V), t.contiguous().view(-1)),
    "all logits": lambda x, w, t: F.cross_entropy(F.linear(x[:, slice(0, None), :], w).view(-1, V), t.view(-1)),
    "sum over items": lambda x, w, t: F.cross_entropy(F.linear(x, w).view(-1, V), t.view(-1), reduction="sum") / 4,
    "each token": lambda x, w, t: F.cross_entropy(F.linear(x, w).view(-1, V), t.view(-1), reduction="none"),
    "multiplied": lambda x, w, t: F.cross_entropy((F.linear(x, w) * 0.25).view(-1, V), t.view(-1)),
    "divided": lambda x, w, t: F.cross_entropy((F.linear(x, w) / 8.0).view(-1, V), t.view(-1)),
    "capped": lambda x, w, t: F.cross_entropy((torch.tanh(F.linear(x, w) / 3.0) * 3.0).view(-1, V), t.view(-1)),
    "capped in float": lambda x, w, t: F.cross_entropy(
        (3.0 * torch.tanh(F.linear(x, w).float() / 3.0)).view(-1, V), t.view(-1)
    ),
    "scaled and capped": lambda x, w, t: F.cross_entropy(
        (torch.tanh(F.linear(x, w) * 2.0 / 3.0) * 3.0).view(-1, V), t.view(-1)
    ),
    "smoothed": lambda x, w, t: F.cross_entropy(F.linear(x, w).view(-1, V), t.view(-1), label_smoothing=0.1),
    "smoothed sum": lambda x, w, t: F.cross_entropy(
        F.linear(x, w).view(-1, V), t.view(-1), reduction="sum", label_smoothing=0.1
    ),
    "another ignored label": lambda x, w, t: F.cross_entropy(
        F.linear(x, w).view(-1, V), t.clamp(min=0).view(-1), ignore_index=0
    ),
    "shifted labels": lambda x, w, t: F.cross_entropy(
        F.linear(x, w).float().view(-1, V), F.pad(t, (0, 1), value=-100)[..., 1:].contiguous().view(-1)
    ),
    "a module": lambda x, w, t: torch.nn.CrossEntropyLoss()(F.linear(x, w).view(-1, V), t.view(-1)),
}


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_spelling_of_a_loss_on_a_vocabulary_is_one_op(name: str, dtype: torch.dtype) -> None:
    inputs = [randn(2, 3, H, dtype=dtype), randn(V, H, dtype=dtype), LABELS]
    outcome = analyse(VARIANTS[name], *inputs)
    assert outcome.ops == ["linear_cross_entropy"]
    assert not outcome.misses
    outcome.assert_tidy()
    assert_as_exact(outcome, VARIANTS[name], inputs)
    if dtype == f32:
        outcome.assert_close(2e-6)


def test_a_bias_of_the_head_is_fused() -> None:
    inputs = [randn(6, H), randn(V, H), randn(V), LABELS.view(-1)]
    outcome = analyse(lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b), t), *inputs)
    assert outcome.ops == ["linear_cross_entropy"]
    outcome.assert_close(2e-6)


@pytest.mark.parametrize("trained", ["x", "w", "b", "x w b"])
def test_a_frozen_head_gets_no_gradient(trained: str) -> None:
    tensors = {"x": randn(6, H), "w": randn(V, H), "b": randn(V)}
    inputs = [t.detach().requires_grad_(name in trained.split()) for name, t in tensors.items()]
    outcome = analyse(lambda x, w, b, t: F.cross_entropy(F.linear(x, w, b), t), *inputs, LABELS.view(-1))
    assert outcome.ops == ["linear_cross_entropy"]
    outcome.assert_close(2e-6)


def test_a_loss_of_only_ignored_labels_equals_eager() -> None:
    nothing = torch.full((6,), -100)
    outcome = analyse(
        lambda x, w, t: F.cross_entropy(F.linear(x, w), t, reduction="sum"), randn(6, H), randn(V, H), nothing
    )
    assert outcome.ops == ["linear_cross_entropy"]
    assert outcome.rewritten.outputs[0] == outcome.eager.outputs[0] == 0
    outcome.assert_close()


def test_a_loss_under_autocast_is_fused() -> None:
    def function(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=bf16):
            logits = F.linear(x, w)
        return F.cross_entropy(logits.float().view(-1, V), t.view(-1))

    outcome = analyse(function, randn(2, 3, H), randn(V, H), LABELS)
    assert not outcome.ops or outcome.ops == ["linear_cross_entropy"]
    outcome.assert_close(2e-2)


@pytest.mark.parametrize("factor", ["multiplied", "divided"])
def test_a_temperature_that_changes_between_steps_is_supported(factor: str) -> None:
    """From the second value on, it is a symbolic input of the graph."""

    def function(x: Tensor, w: Tensor, t: Tensor, temperature: float) -> Tensor:
        logits = F.linear(x, w)
        return F.cross_entropy(logits * temperature if factor == "multiplied" else logits / temperature, t)

    given: tuple[Any, ...] = (randn(6, H), randn(V, H), LABELS.view(-1))
    outcome = analyse(function, *given, 3.0, dynamic=True)
    outcome.assert_close(2e-6)


def test_a_dynamic_number_of_tokens_is_supported() -> None:
    x, labels = randn(6, H), LABELS.view(-1)
    for tensor in (x, labels):
        torch._dynamo.mark_dynamic(tensor, 0)
    outcome = analyse(lambda x, w, t: F.cross_entropy(F.linear(x, w), t), x, randn(V, H), labels, dynamic=None)
    assert outcome.ops == ["linear_cross_entropy"]
    outcome.assert_close(2e-6)
