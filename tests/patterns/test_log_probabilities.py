"""Log probabilities of labels, as in preference and policy losses, become the negated fused cross-entropy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphs import Lookalike, analyse, assert_as_exact, bf16, f32, randn
from torch import Tensor

from fastlora.rewrite.refusal import Code

V, H = 40, 16
LABELS = torch.tensor([[1, 39, 5], [0, 0, 7]])
X, W = randn(2, 3, H), randn(V, H)


def picked(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    return log_probabilities.gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def log_probabilities(x: Tensor, w: Tensor, t: Tensor) -> Tensor:
    return picked(F.linear(x, w).log_softmax(-1), t)


SPELLINGS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "methods": log_probabilities,
    "functions": lambda x, w, t: torch.gather(
        F.log_softmax(F.linear(x, w), dim=-1), dim=2, index=t.unsqueeze(2)
    ).squeeze(2),
    "in float32": lambda x, w, t: picked(F.log_softmax(F.linear(x, w).float(), -1), t),
    "by dtype": lambda x, w, t: picked(F.log_softmax(F.linear(x, w), -1, dtype=torch.float32), t),
    "flat": lambda x, w, t: picked(torch.log_softmax(F.linear(x, w).view(-1, V), -1), t.view(-1)),
    "divided by a temperature": lambda x, w, t: picked(F.log_softmax(F.linear(x, w) / 0.7, -1), t),
    "capped": lambda x, w, t: picked(F.log_softmax(torch.tanh(F.linear(x, w) / 3.0) * 3.0, -1), t),
    "mean loss": lambda x, w, t: -picked(F.log_softmax(F.linear(x, w), -1), t).mean(),
    "masked": lambda x, w, t: (picked(F.log_softmax(F.linear(x, w), -1), t) * (t > 0)).sum(-1),
}


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("name", SPELLINGS)
def test_log_probabilities_are_a_negated_cross_entropy(name: str, dtype: torch.dtype) -> None:
    inputs = [X.detach().to(dtype).requires_grad_(), W.detach().to(dtype).requires_grad_(), LABELS]
    outcome = analyse(SPELLINGS[name], *inputs)
    assert outcome.ops == ["linear_cross_entropy"], outcome.missed()
    assert not outcome.misses
    outcome.assert_tidy()
    assert_as_exact(outcome, SPELLINGS[name], inputs)
    if dtype == f32:
        outcome.assert_close(2e-6)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_verification_passes(dtype: torch.dtype) -> None:
    inputs = [X.detach().to(dtype).requires_grad_(), W.detach().to(dtype).requires_grad_(), LABELS]
    outcome = analyse(log_probabilities, *inputs, verify=True)
    assert outcome.ops == ["linear_cross_entropy"], outcome.turned_down()


def test_dynamic_sizes_are_supported() -> None:
    x = randn(4, 3, H)
    torch._dynamo.mark_dynamic(x, 0)
    outcome = analyse(lambda x, w: log_probabilities(x, w, (x[..., 0] > 0).long()), x, W, dynamic=None)
    assert outcome.ops == ["linear_cross_entropy"], outcome.missed()
    outcome.assert_close(2e-6)


def test_dynamic_sizes_that_may_differ_are_not_fused() -> None:
    """`gather` also accepts fewer labels than rows, so the two sizes may be independent."""
    x, labels = randn(4, 3, H), LABELS.repeat(2, 1)
    for tensor in (x, labels):
        torch._dynamo.mark_dynamic(tensor, 0)
    outcome = analyse(log_probabilities, x, W, labels, dynamic=None)
    assert not outcome.ops
    assert "the labels are not one for each row" in outcome.missed()


def test_logits_that_are_also_returned_are_not_fused() -> None:
    def function(x: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x, w)
        return picked(logits.log_softmax(-1), t), logits

    outcome = analyse(function, X, W, LABELS)
    assert Code.ESCAPES in outcome.codes()
    outcome.assert_identical()


GIVEN = (X, W, LABELS)
LOOKALIKES = [
    Lookalike("fewer labels than rows", lambda x, w, t: log_probabilities(x, w, t[:, :2]), GIVEN, missed="not one for"),
    Lookalike("fewer rows than labels", lambda x, w, t: log_probabilities(x, w, t[:1]), GIVEN, missed="not one for"),
    Lookalike("another dimension", lambda x, w, t: picked(F.linear(x, w).log_softmax(1), t), GIVEN),
    Lookalike(
        "probabilities",
        lambda x, w, t: picked(F.linear(x, w).softmax(-1), t),
        GIVEN,
    ),
    Lookalike(
        "rows picked",
        lambda x, w, t: F.linear(x, w).log_softmax(-1).gather(1, t.unsqueeze(-1)).squeeze(-1),
        (X, W, LABELS.clamp(max=2)),
    ),
    Lookalike(
        "two labels a row",
        lambda x, w, t: F.linear(x, w).log_softmax(-1).gather(-1, torch.stack((t, t), -1)),
        GIVEN,
    ),
    Lookalike("few classes", log_probabilities, (X, randn(8, H), LABELS.clamp(max=7))),
    Lookalike(
        "a mask on the logits",
        lambda x, w, t: picked((F.linear(x, w) + torch.ones(V)).log_softmax(-1), t),
        GIVEN,
    ),
]


@pytest.mark.parametrize("lookalike", LOOKALIKES, ids=str)
def test_lookalikes_of_log_probabilities_are_not_fused(lookalike: Lookalike) -> None:
    lookalike.check()
