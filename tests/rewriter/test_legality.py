"""The legality checks ESCAPES, ORDER, EFFECT and MODE, on matches that no other check refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import analyse, bf16, lora, randn, rms_norm
from torch import Tensor

from fastlora.kernels.core.library import register_op
from fastlora.match.dsl import tanh
from fastlora.match.rule import rule
from fastlora.rewrite.refusal import Code

X, Y, W = randn(2, 3, 16), randn(2, 3, 16, seed=1), randn(16)
LAYER = (randn(24, 16, grad=False), randn(4, 16), randn(24, 4))
OTHER = (randn(24, 16, grad=False, seed=1), randn(4, 16, seed=2), randn(24, 4, seed=2))
BF16 = X.detach().to(bf16).requires_grad_()


def _adapted(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return an adapted layer without a cast of its result."""
    return F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0


# ---- ESCAPES


def test_a_returned_intermediate_refuses_the_match() -> None:
    def function(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        active = F.silu(gate)
        return active * up, active

    outcome = analyse(function, X, Y)
    assert "the intermediate value active leaves the graph as an output" in outcome.missed()
    outcome.assert_identical()


def test_an_intermediate_returned_through_an_identity_refuses_it() -> None:
    def function(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        active = F.silu(gate)
        return active * up, active.contiguous().float()

    outcome = analyse(function, X, Y)
    assert Code.ESCAPES in outcome.codes()
    outcome.assert_identical()


def test_a_shared_cast_is_kept_for_other_users() -> None:
    """A cast is cheap, so the norm is replaced and the cast is computed for its other users."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        h = x.float()
        return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype), h * 3

    outcome = analyse(function, BF16, W)
    assert outcome.ops == ["rms_norm"]
    outcome.assert_close(2e-2)


# ---- ORDER


def test_an_output_used_before_an_input_refuses_the_match() -> None:
    """The weight of the norm is computed from the sum before it."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        total = x + y
        return F.layer_norm(total, (16,), total.mean((0, 1)), None, 1e-5)

    outcome = analyse(function, X, Y)
    assert outcome.ops == ["layer_norm"]
    assert Code.ORDER in outcome.codes()
    outcome.assert_close()


def test_an_op_is_inserted_before_the_first_use_of_any_output() -> None:
    """The residual sum is used before its norm."""

    def function(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        early = torch.sin(total)
        return rms_norm(total, w) * early, total

    outcome = analyse(function, X, Y, W)
    assert outcome.ops == ["add_rms_norm"]
    outcome.assert_close()


def test_graphs_with_data_dependent_sizes_are_rewritten() -> None:
    def function(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        positive = gate[gate[..., 0] > 0]
        shares = positive.cumsum(-1)
        shares.add_(1)
        return F.silu(gate) * up, F.silu(shares) * positive

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        outcome = analyse(function, X, Y)
    assert "glu" in outcome.ops
    outcome.assert_close()


# ---- EFFECT


@pytest.mark.parametrize("written", ["gate", "its alias"])
def test_a_write_after_the_first_read_refuses_the_match(written: str) -> None:
    def function(both: Tensor) -> Tensor:
        gate, up = (both * 1.5).chunk(2, -1)
        active = F.silu(gate)
        (gate if written == "gate" else gate.view(-1, 8)).add_(1)
        return active * up

    outcome = analyse(function, X.detach())
    assert "add_ writes to the input" in outcome.missed()
    outcome.assert_identical()


def test_a_write_in_the_match_before_the_first_read_is_allowed() -> None:
    """The write is after the first node of the match."""

    def function(gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate * 1.5, up * 1.5
        active = F.silu(gate)
        up.add_(1)
        return active * up

    outcome = analyse(function, X, Y)
    assert outcome.ops == ["glu"]
    outcome.assert_close()


def test_a_write_before_the_match_is_allowed() -> None:
    def function(gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate * 1.5, up * 1.5
        up.add_(1)
        return F.silu(gate) * up

    outcome = analyse(function, X, Y)
    assert outcome.ops == ["glu"]
    outcome.assert_close()


def test_a_write_between_the_op_and_the_first_read_refuses_it() -> None:
    """The first layer's result is used before the second layer's weight is written, so they cannot be grouped."""

    def function(x: Tensor, *layers: Tensor) -> tuple[Tensor, Tensor]:
        q = _adapted(x, *layers[:3])
        early = q.sin()
        layers[3].mul_(2)
        return early, _adapted(x, *layers[3:])

    outcome = analyse(function, X, *LAYER, *OTHER)
    assert outcome.ops == ["lora_linear", "lora_linear"]
    assert "mul_ writes to the input" in outcome.turned_down()
    outcome.assert_close()


def test_a_norm_after_an_in_place_residual_addition_is_fused() -> None:
    """Nothing reads the value that the sum is written over."""

    def function(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        x = x * 1.5
        x += y
        return rms_norm(x, w)

    for x in (X, BF16):
        outcome = analyse(function, x, Y.detach().to(x.dtype).requires_grad_(), W)
        assert outcome.ops == ["add_rms_norm"], outcome.missed()
        outcome.assert_close(1e-6 if x is X else 2e-2)


def test_a_later_write_to_the_result_refuses_the_match() -> None:
    def function(gate: Tensor, up: Tensor) -> Tensor:
        y = F.silu(gate) * up
        y.add_(1)
        return y

    outcome = analyse(function, X, Y)
    assert Code.EFFECT in outcome.codes()
    outcome.assert_identical()


def test_a_write_inside_a_checkpoint_refuses_the_match() -> None:
    from torch.utils.checkpoint import checkpoint

    def write(x: Tensor) -> Tensor:
        x.mul_(2)
        return x * 2

    def function(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = x * 1.5
        base = F.linear(x, w)
        checkpoint(write, x, use_reentrant=False)
        return base + F.linear(F.linear(x, a), b) * 2.0

    outcome = analyse(function, X.detach(), *LAYER)
    assert "lora_linear" not in outcome.ops
    outcome.assert_close()


def test_a_dropout_inside_refuses_the_match() -> None:
    from fastlora.match.dsl import dropout

    toy = register_op(
        "legality_dropout",
        family="toy",
        schema="(Tensor x) -> (Tensor y)",
        outputs=1,
        reference=torch.tanh,
        forward=lambda x: (x.tanh(),),
        backward=lambda wanted, grads, x: {"x": grads[0] * (1 - x.tanh() ** 2)},
        saves=("x",),
    )

    @rule(toy, anchor="tanh")
    def dropped(x):
        return tanh(dropout(x, lambda _: True))

    outcome = analyse(lambda x: torch.tanh(F.dropout(x, 0.5)), X, rules=[dropped])
    assert "is random" in outcome.missed()
    outcome.assert_identical()


# ---- MODE


def test_a_match_does_not_span_gradient_modes() -> None:
    def function(gate: Tensor, up: Tensor) -> Tensor:
        with torch.no_grad():
            active = F.silu(gate)
        return active * up

    outcome = analyse(function, X, Y)
    assert Code.MODE in outcome.codes()
    outcome.assert_identical()


def test_a_match_does_not_span_autocast_modes() -> None:
    def function(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        base = F.linear(x, w)
        with torch.autocast("cpu", dtype=bf16):
            low = F.linear(F.linear(x, a), b)
        return base + low * 2.0

    outcome = analyse(function, X, *LAYER)
    assert Code.MODE in outcome.codes()
    outcome.assert_identical()


@pytest.mark.parametrize(
    "region", [torch.no_grad, lambda: torch.autocast("cpu", dtype=bf16)], ids=["no_grad", "autocast"]
)
def test_an_op_is_not_placed_in_another_mode_than_its_nodes(region: Any) -> None:
    """The sum is first used in a region without gradients, and the norm is outside."""

    def function(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        with region():
            spread = total.abs().amax()
        return rms_norm(total, w), spread

    outcome = analyse(function, X, Y, W)
    outcome.assert_close()


@pytest.mark.parametrize(
    "region", [torch.no_grad, lambda: torch.autocast("cpu", dtype=bf16)], ids=["no_grad", "autocast"]
)
def test_a_group_is_not_placed_in_another_mode_than_its_members(region: Any) -> None:
    def function(x: Tensor, *layers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q = _adapted(x, *layers[:3])
        with region():
            spread = q.abs().amax()
        return q, _adapted(x, *layers[3:]), spread

    outcome = analyse(function, X, *LAYER, *OTHER)
    outcome.assert_close()


def test_whole_matches_inside_a_region_are_replaced() -> None:
    def function(x: Tensor, gate: Tensor, up: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            still = F.silu(gate) * up
        with torch.autocast("cpu", dtype=bf16):
            low = lora(x, w, a, b)
        return still, low

    outcome = analyse(function, X, X, Y, *LAYER)
    assert outcome.ops == ["glu", "lora_linear"]
    outcome.assert_close(2e-2)
