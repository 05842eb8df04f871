"""Graphs that resemble a gated unit, a gated MLP or a loss over a vocabulary are not fused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import Lookalike, analyse, bf16, lora, randn, rms_norm
from torch import Tensor

GATE, UP = randn(2, 3, 16), randn(2, 3, 16, seed=1)


def escaping_activation(gate, up):
    active = F.silu(gate)
    return active * up, active


def mutated_activation(gate, up):
    active = F.gelu(gate)
    active.clamp_(max=1.0)
    return active * up


def written_between(gate, up):
    gate, up = gate * 1.5, up * 1.5
    active = F.silu(gate)
    gate.add_(1)
    return active * up


def activated_without_gradients(gate, up):
    with torch.no_grad():
        active = F.silu(gate)
    return active * up


GLUS = [
    Lookalike("relu for silu", lambda gate, up: F.relu(gate) * up, (GATE, UP)),
    Lookalike("sigmoid for silu", lambda gate, up: torch.sigmoid(gate) * up, (GATE, UP)),
    Lookalike("a sum for the product", lambda gate, up: F.silu(gate) + up, (GATE, UP)),
    Lookalike("a quotient for the product", lambda gate, up: F.silu(gate) / up.exp(), (GATE, UP)),
    Lookalike("the product with a number", lambda gate, up: F.silu(gate) * 2.0 + up, (GATE, UP)),
    Lookalike(
        "the product with a number of the graph", lambda gate: F.silu(gate) * gate.shape[1], (GATE,), dynamic=True
    ),
    Lookalike("the gate broadcasts", lambda gate, up: F.silu(gate) * up, (randn(2, 3, 1), UP)),
    Lookalike("up broadcasts", lambda gate, up: F.gelu(gate) * up, (GATE, randn(16))),
    Lookalike(
        "gate and up differ in dtype",
        lambda gate, up: F.silu(gate) * up,
        (GATE, UP.detach().to(bf16).requires_grad_()),
        missed="dtype",
    ),
    Lookalike(
        "the activation leaves the graph", escaping_activation, (GATE, UP), missed="leaves the graph as an output"
    ),
    Lookalike("the activation is clamped in place", mutated_activation, (GATE, UP), missed="clamp_"),
    Lookalike("the gate is written between", written_between, (GATE.detach(), UP), missed="in place"),
    Lookalike(
        "the activation has no gradients",
        activated_without_gradients,
        (GATE, UP),
        missed="gradient or autocast modes",
    ),
    Lookalike("the activation is detached", lambda gate, up: F.silu(gate).detach() * up, (GATE, UP)),
    Lookalike("the activation is made whole", lambda gate, up: F.silu(4 * gate).to(torch.int32) * up, (GATE, UP)),
    Lookalike("up is made whole", lambda gate, up: F.silu(gate) * (4 * up).to(torch.int32), (GATE, UP)),
    Lookalike("the activation is squared", lambda gate, up: F.silu(gate) * F.silu(gate) + up, (GATE, UP), ("glu",)),
    Lookalike(
        "the activation is normalised",
        lambda gate, w: rms_norm(F.silu(gate), w),
        (GATE, randn(16)),
        ("rms_norm",),
    ),
]

HIDDEN, HEAD = randn(6, 16), randn(32, 16)
LABELS = torch.tensor([1, 31, 0, -100, 7, 8])
LOSS = (HIDDEN, HEAD, LABELS)


def escaping_logits(x, w, labels):
    logits = F.linear(x, w)
    return F.cross_entropy(logits, labels), logits


def predicting(x, w, labels):
    logits = F.linear(x, w)
    return F.cross_entropy(logits.view(-1, 32), labels), logits.argmax(-1)


def banned_token(x, w, labels):
    logits = F.linear(x, w)
    logits[:, 3] = -1e4
    return F.cross_entropy(logits, labels)


def head_without_gradients(x, w, labels):
    with torch.no_grad():
        logits = F.linear(x, w)
    return F.cross_entropy(logits * x.mean(), labels)


def capped(inner: float, outer: float):
    return lambda x, w, labels: F.cross_entropy(torch.tanh(F.linear(x, w) / inner) * outer, labels)


LOSSES = [
    Lookalike(
        "classes have weights",
        lambda x, w, labels, weights: F.cross_entropy(F.linear(x, w), labels, weights),
        (*LOSS, randn(32, grad=False).abs()),
        missed="has weight=",
    ),
    Lookalike(
        "labels are probabilities",
        lambda x, w, labels: F.cross_entropy(F.linear(x, w), labels),
        (HIDDEN, HEAD, randn(6, 32, grad=False).softmax(-1)),
        missed="probabilities",
    ),
    Lookalike("logits leave the graph", escaping_logits, LOSS, missed="leaves the graph as an output"),
    Lookalike(
        "predictions leave the graph",
        predicting,
        (HIDDEN.detach().view(2, 3, 16).requires_grad_(), HEAD, LABELS),
        missed="is also used by",
    ),
    Lookalike(
        "fewer classes than hidden values",
        lambda x, w, labels: F.cross_entropy(F.linear(x, w), labels),
        (HIDDEN, randn(8, 16), LABELS.clamp(max=7)),
    ),
    Lookalike(
        "classes are the middle dimension",
        lambda x, w, labels: F.cross_entropy(F.linear(x, w).transpose(1, 2), labels),
        (HIDDEN.detach().view(2, 3, 16).requires_grad_(), HEAD, LABELS.view(2, 3)),
    ),
    Lookalike(
        "logits are detached", lambda x, w, labels: F.cross_entropy(F.linear(x, w).detach() * x.mean(), labels), LOSS
    ),
    Lookalike("the head has no gradients", head_without_gradients, LOSS),
    Lookalike("a token is banned in place", banned_token, LOSS, missed="setitem"),
    Lookalike(
        "a token is masked",
        lambda x, w, labels: F.cross_entropy(F.linear(x, w).masked_fill(w[:, 0] > 1, -1e4), labels),
        LOSS,
    ),
    Lookalike(
        "a bias joins later", lambda x, w, labels, b: F.cross_entropy(F.linear(x, w) + b, labels), (*LOSS, randn(32))
    ),
    Lookalike(
        "the temperature is learned",
        lambda x, w, labels, t: F.cross_entropy(F.linear(x, w) / t, labels),
        (*LOSS, torch.tensor(2.0, requires_grad=True)),
        missed="l_t_",
    ),
    Lookalike("the cap is undone with another", capped(3.0, 2.0), LOSS, missed="loss"),
    Lookalike("the cap is negative", capped(-2.0, -2.0), LOSS),
    Lookalike(
        "the head is computed",
        lambda x, w, labels: F.cross_entropy(F.linear(x, w * 2), labels),
        LOSS,
        missed="is not a parameter",
    ),
    Lookalike(
        "rows are regrouped",
        lambda x, w, labels: F.cross_entropy(F.linear(x, w).view(2, 3, 32).transpose(0, 1).reshape(6, 32), labels),
        LOSS,
    ),
    Lookalike(
        "classes are regrouped",
        lambda x, w, labels: F.cross_entropy(F.linear(x, w).view(12, 16), labels),
        (HIDDEN, HEAD, LABELS.repeat(2).clamp(max=15)),
        missed="classes are not the last",
    ),
]


@pytest.mark.parametrize("case", GLUS, ids=str)
def test_gated_unit_lookalikes_are_not_fused(case: Lookalike) -> None:
    case.check()


@pytest.mark.parametrize("case", LOSSES, ids=str)
def test_vocabulary_loss_lookalikes_are_not_fused(case: Lookalike) -> None:
    case.check()


def test_an_activation_without_a_gate_is_not_a_candidate() -> None:
    """Otherwise a strict compilation would raise, and reports would list it as missed."""
    for function in (
        lambda x, w: rms_norm(F.silu(x), w),
        lambda x, w: F.gelu(x) * 2.0 + w,
    ):
        assert not analyse(function, GATE, randn(16)).misses


def test_logits_divided_by_zero_are_not_fused() -> None:
    outcome = analyse(lambda x, w, labels: F.cross_entropy(F.linear(x, w) / 0.0, labels), *LOSS)
    assert outcome.rewritten.outputs[0].isnan()
    assert outcome.eager.outputs[0].isnan()


ADAPTED = (randn(24, 16, grad=False), randn(4, 16), randn(24, 4))


def _mlp(x: Tensor, *weights: Tensor) -> Tensor:
    gate, up, down = weights[:3], weights[3:6], weights[6:]
    return lora(F.silu(lora(x, *gate)) * lora(x, *up), *down)


@pytest.mark.parametrize("narrow", ["gate", "up"])
def test_an_mlp_with_a_broadcast_gate_is_not_one_op(narrow: str) -> None:
    column = (randn(1, 16, grad=False), randn(4, 16, seed=2), randn(1, 4))
    layers = (column, ADAPTED) if narrow == "gate" else (ADAPTED, column)
    outcome = analyse(_mlp, GATE, *layers[0], *layers[1], randn(16, 24, grad=False), randn(4, 24), randn(16, 4))
    assert "lora_mlp" not in outcome.ops
    outcome.assert_close()


def test_an_mlp_whose_hidden_product_escapes_is_not_one_op() -> None:
    def function(x: Tensor, *weights: Tensor) -> tuple[Tensor, Tensor]:
        hidden = F.silu(lora(x, *weights[:3])) * lora(x, *weights[3:6])
        return lora(hidden, *weights[6:]), hidden

    inner = [randn(24, 16, grad=False), randn(4, 16, seed=2), randn(24, 4, seed=2)]
    outcome = analyse(function, GATE, *ADAPTED, *inner, randn(16, 24, grad=False), randn(4, 24), randn(16, 4))
    assert outcome.ops == ["glu", "lora_group", "lora_linear"]
    outcome.assert_close(2e-6)


def test_gate_and_up_with_different_inputs_are_not_one_mlp() -> None:
    def function(x: Tensor, y: Tensor, *weights: Tensor) -> Tensor:
        return lora(F.silu(lora(x, *weights[:3])) * lora(y, *weights[3:6]), *weights[6:])

    inner = [randn(24, 16, grad=False), randn(4, 16, seed=2), randn(24, 4, seed=2)]
    outcome = analyse(function, GATE, UP, *ADAPTED, *inner, randn(16, 24, grad=False), randn(4, 24), randn(16, 4))
    assert outcome.ops == ["glu", "lora_linear", "lora_linear", "lora_linear"]
    outcome.assert_close(2e-6)


@pytest.mark.parametrize("wide", [0, 3, 6], ids=["gate", "up", "down"])
def test_adapters_of_different_dtypes_are_not_one_mlp(wide: int) -> None:
    layers = [*ADAPTED, *ADAPTED, randn(16, 24, grad=False), randn(4, 24), randn(16, 4)]
    for adapter in (wide + 1, wide + 2):
        layers[adapter] = layers[adapter].detach().double().requires_grad_()
    outcome = analyse(_mlp, GATE, *layers)
    assert outcome.ops.count("lora_linear") + 2 * outcome.ops.count("lora_group") == 3
    assert "lora_mlp" not in outcome.ops
    outcome.assert_close(2e-6)
