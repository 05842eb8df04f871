"""Verification refuses rules whose op computes something else, and accepts correct rules."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import analyse, bf16, lora, randn, rms_norm, rotary
from torch import Tensor

from fastlora.kernels import ops
from fastlora.kernels.core.library import register_op
from fastlora.match.dsl import Op, Opt, Param, Scalar, cast, gelu, mean, rsqrt, silu, tanh
from fastlora.match.rule import Rule, dtype_of, rule
from fastlora.patterns.rotary import _rotate
from fastlora.rewrite.refusal import Code

X, Y, W = randn(2, 3, 16), randn(2, 3, 16, seed=1), randn(16)
BF16 = X.detach().to(bf16).requires_grad_()
LAYER = (randn(24, 16, grad=False), randn(4, 16), randn(24, 4))
OTHER = (randn(24, 16, grad=False, seed=1), randn(4, 16, seed=2), randn(24, 4, seed=2))
DOWN = (randn(16, 24, grad=False), randn(4, 24), randn(16, 4))
TABLES = randn(4, 8, grad=False), randn(4, 8, seed=1, grad=False)

_NORM = {
    "compute_dtype": dtype_of(),
    "norm_dtype": dtype_of(),
    "scale_dtype": dtype_of(),
    "out_dtype": dtype_of(),
}


def _weight_for_its_distance() -> Rule:
    @rule(ops.rms_norm, attrs={**_NORM, "offset": 0.0})
    def wrong(x, weight: Param(1), eps: Scalar):
        return x * rsqrt(mean(x**2) + eps) * (1.0 + weight)

    return wrong


def _silu_for_gelu() -> Rule:
    @rule(ops.glu, attrs={"activation": "gelu", "out_dtype": dtype_of()})
    def wrong(gate, up):
        return silu(gate) * up

    return wrong


def _flipped_for_half() -> Rule:
    attrs = {"layout": "flipped", "rotary_dim": 8, "compute_dtype": dtype_of(), "out_dtype": dtype_of()}

    @rule(ops.rotary, attrs=attrs)
    def wrong(x, cos, sin):
        return x * cos + _rotate(x) * sin

    return wrong


def _doubled_scaling() -> Rule:
    attrs: dict[str, Any] = {"lora_dtype": dtype_of(), "out_dtype": dtype_of()}

    @rule(ops.lora_add, attrs={**attrs, "scaling": lambda match: 2 * match.value("_s")})
    def wrong(base, x, lora_a: Param(2), lora_b: Param(2), lora_bias: Opt[Param(1)], _s: Scalar):
        from fastlora.match.dsl import linear

        return base + linear(linear(x, lora_a), lora_b, lora_bias) * _s

    return wrong


def _sum_for_mean() -> Rule:
    attrs = {
        "reduction": "sum",
        "scale": 1.0,
        "softcap": 0.0,
        "base_dtype": dtype_of(),
        "logits_dtype": dtype_of(),
        "ignore_index": -100,
        "label_smoothing": 0.0,
        "z_loss": 0.0,
    }

    @rule(ops.linear_cross_entropy, attrs=attrs)
    def wrong(x, weight: Param(2), bias: Opt, labels):
        from fastlora.match.dsl import linear

        anything = lambda _: True  # noqa: E731
        head = linear(x, weight, bias)
        return Op("cross_entropy", input=head, target=labels, ignore_index=anything, reduction=anything)

    return wrong


WRONG: dict[str, tuple[Callable[[], Rule], Callable[..., Tensor], tuple[Any, ...]]] = {
    "weight for its distance from one": (
        _weight_for_its_distance,
        lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + w),
        (X, W),
    ),
    "silu for gelu": (_silu_for_gelu, lambda x, y: F.silu(x) * y, (X, Y)),
    "flipped for half": (_flipped_for_half, rotary, (randn(2, 3, 4, 8), *TABLES)),
    "a doubled scaling": (
        _doubled_scaling,
        lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0,
        (X, *LAYER),
    ),
    "sum for mean": (
        _sum_for_mean,
        lambda x, w, labels: F.cross_entropy(F.linear(x, w), labels),
        (randn(6, 16), randn(32, 16), torch.arange(6)),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_that_claims_another_computation_is_refused(name: str) -> None:
    make, function, inputs = WRONG[name]
    outcome = analyse(function, *inputs, rules=[make()], verify=True)
    assert not outcome.ops
    assert Code.NUMERICS in outcome.codes()
    assert "in float64" in outcome.turned_down()
    outcome.assert_identical()


@pytest.mark.parametrize("name", WRONG)
def test_without_verification_a_wrong_rule_is_applied(name: str) -> None:
    """No legality check refuses it."""
    make, function, inputs = WRONG[name]
    assert analyse(function, *inputs, rules=[make()]).ops


def _toy(name: str, forward: Any, backward: Any) -> Rule:
    toy = register_op(
        f"verified_{name}",
        family="toy",
        schema="(Tensor x, float scale) -> (Tensor y)",
        outputs=1,
        reference=lambda x, scale: x.tanh() * scale,
        forward=forward,
        backward=backward,
        saves=("x",),
    )

    @rule(toy)
    def scaled(x, scale: Scalar):
        return tanh(x) * scale

    return scaled


def _tanh_backward(wanted: Any, grads: list[Tensor], x: Tensor, scale: float) -> dict[str, Tensor]:
    return {"x": grads[0] * scale * (1 - x.tanh() ** 2)}


def test_a_wrong_backward_is_refused_naming_the_gradient() -> None:
    """Only the formula of the gradient is wrong."""
    wrong = _toy(
        "backward", lambda x, scale: (x.tanh() * scale,), lambda wanted, grads, x, scale: {"x": grads[0] * scale}
    )
    outcome = analyse(lambda x: x.tanh() * 3.0, X, rules=[wrong], verify=True)
    assert not outcome.ops
    assert "the gradient of" in outcome.turned_down()


def test_a_forward_that_is_less_exact_than_the_matched_nodes_is_refused() -> None:
    coarse = _toy("forward", lambda x, scale: ((x.to(bf16).tanh() * scale).float(),), _tanh_backward)
    outcome = analyse(lambda x: x.tanh() * 3.0, X, rules=[coarse], verify=True)
    assert not outcome.ops
    assert "less exact" in outcome.turned_down()


def test_a_match_is_verified_with_its_own_constants() -> None:
    """The first match is right by chance, the second one is not."""
    doubling = register_op(
        "verified_doubling",
        family="toy",
        schema="(Tensor x) -> (Tensor y)",
        outputs=1,
        reference=lambda x: x.tanh() * 2,
        forward=lambda x: (x.tanh() * 2,),
        backward=lambda wanted, grads, x: {"x": grads[0] * 2 * (1 - x.tanh() ** 2)},
        saves=("x",),
    )

    @rule(doubling)
    def any_scale(x):
        return Op("mul", input=tanh(x), other=lambda value: isinstance(value, float))

    outcome = analyse(lambda x: (x.tanh() * 2.0, x.tanh() * 3.0), X, rules=[any_scale], verify=True)
    assert outcome.ops == ["verified_doubling"]
    outcome.assert_close()


def _mlp(x: Tensor, *weights: Tensor) -> Tensor:
    return lora(F.silu(lora(x, *weights[:3])) * lora(x, *weights[3:6]), *weights[6:])


EXPERTS = (randn(2, 8, 16, grad=False), randn(2, 8, 2), randn(2, 2, 16))


def _experts(x: Tensor, w: Tensor, left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    from transformers.integrations.moe import _grouped_mm

    return _grouped_mm(x, torch.baddbmm(w, left, right, alpha=2.0).mT, ends)


RIGHT: dict[str, tuple[list[str], Callable[..., Any], tuple[Any, ...]]] = {
    "rms_norm": (["rms_norm"], rms_norm, (X, W)),
    "rms_norm in bfloat16": (["rms_norm"], rms_norm, (BF16, W.detach().to(bf16).requires_grad_())),
    "add_rms_norm": (["add_rms_norm"], lambda x, y, w: rms_norm(x + y, w), (X, Y, W)),
    "layer_norm": (["layer_norm"], lambda x, w, b: F.layer_norm(x, (16,), w, b, 1e-5), (X, W, W)),
    "add_layer_norm": (["add_layer_norm"], lambda x, y, w: F.layer_norm(x + y, (16,), w, None, 1e-5), (X, Y, W)),
    "rotary": (["rotary"], rotary, (randn(2, 3, 4, 8), *TABLES)),
    "partial rotary": (
        ["rotary"],
        lambda x, cos, sin: torch.cat((rotary(x[..., :8], cos, sin), x[..., 8:]), -1),
        (randn(2, 3, 4, 12), *TABLES),
    ),
    "glu": (["glu"], lambda x, y: F.gelu(x, approximate="tanh") * y, (X, Y)),
    "lora_linear": (["lora_linear"], lora, (X, *LAYER)),
    "lora_linear with dropout": (["lora_linear"], lambda x, *layer: lora(x, *layer, p=0.5), (X, *LAYER)),
    "lora_linear in bfloat16": (["lora_linear"], lora, (BF16, LAYER[0].to(bf16), *LAYER[1:])),
    "lora_add": (["lora_add"], lambda x, w, a, b: lora(x, w, a, b).relu() + lora(x, w * 2, a, b), (X, *LAYER)),
    "lora_group": (["lora_group"], lambda x, *w: (lora(x, *w[:3]), lora(x, *w[3:])), (X, *LAYER, *OTHER)),
    "lora_mlp": (["lora_mlp"], _mlp, (X, *LAYER, *OTHER, *DOWN)),
    "lora_experts": (["lora_experts"], _experts, (X[0], *EXPERTS, torch.tensor([1, 3], dtype=torch.int32))),
    "lora_experts in bfloat16": (
        ["lora_experts"],
        _experts,
        (BF16[0], *(t.to(bf16) for t in EXPERTS), torch.tensor([1, 3], dtype=torch.int32)),
    ),
    "linear_cross_entropy": (
        ["linear_cross_entropy"],
        lambda x, w, labels: F.cross_entropy(F.linear(x, w).float(), labels),
        (randn(6, 16), randn(32, 16), torch.arange(6)),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_rule_passes_verification(name: str) -> None:
    expected, function, inputs = RIGHT[name]
    outcome = analyse(function, *inputs, verify=True)
    assert Code.NUMERICS not in outcome.codes()
    assert set(expected) <= set(outcome.ops)


def test_symbolic_numbers_are_replayed_with_their_hint() -> None:
    """The eps of a norm, with several values in one process."""
    outcome = analyse(rms_norm, X, W, 0.5, verify=True, dynamic=True)
    assert outcome.ops == ["rms_norm"], outcome.turned_down()
    assert not isinstance(outcome.chosen[0].arguments["eps"], float)
    outcome.assert_close()


def test_verification_does_not_change_random_states() -> None:
    torch.manual_seed(5)
    random.seed(5)
    before = torch.get_rng_state(), random.getstate()
    gelu_rule = _toy("rng", lambda x, scale: (x.tanh() * scale,), _tanh_backward)
    state = torch.get_rng_state()
    outcome_rules = [gelu_rule]

    def backend(gm: torch.fx.GraphModule, given: Any) -> Any:
        from fastlora.rewrite.pipeline import rewrite

        (made,) = rewrite(gm, outcome_rules, verify=True)
        assert made.chosen
        return gm.forward

    torch._dynamo.reset()
    torch.compile(lambda x: x.tanh() * 3.0, backend=backend)(X)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert torch.equal(state, before[0])
    assert random.getstate() == before[1]


def test_verification_does_not_change_parameters_or_gradients() -> None:
    w = W.detach().clone().requires_grad_()
    before = w.detach().clone()
    outcome = analyse(rms_norm, X, w, verify=True)
    assert outcome.ops == ["rms_norm"]
    assert torch.equal(w, before)
    assert w.grad is None


def test_verification_works_with_gradients_disabled() -> None:
    with torch.no_grad():
        outcome = analyse(lambda x, y: F.silu(x) * y, X.detach(), Y.detach(), verify=True)
    assert outcome.ops == ["glu"]


def test_verification_works_under_autocast() -> None:
    def function(x: Tensor, *layer: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=bf16):
            return lora(x, *layer)

    inside = analyse(function, X, *LAYER, verify=True)
    with torch.autocast("cpu", dtype=bf16):
        ambient = analyse(lora, X, *LAYER, verify=True)
    assert inside.ops == ambient.ops == ["lora_linear"]


def test_a_correct_gelu_rule_passes_verification() -> None:
    """The counterpart of the refusals above."""

    @rule(ops.glu, attrs={"activation": "gelu", "out_dtype": dtype_of()})
    def right(gate, up):
        return cast(gelu(gate) * up)

    outcome = analyse(lambda x, y: F.gelu(x) * y, X, Y, rules=[right], verify=True)
    assert outcome.ops == ["glu"]
    outcome.assert_close()
