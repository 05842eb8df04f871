"""Dropout of adapters is fused, from a seed that the graph draws, as on a GPU; the device check is patched here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import Function, analyse, bf16, evaluate, f32, lora, randn, trace
from seeded_dropout import P, assert_same, check, drop, through_aot_autograd
from tiny_models import batch, build, relative, step
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.frontend.session import default_rules
from fastlora.kernels import ops
from fastlora.lower.lowering import lower
from fastlora.match.dsl import Opt, Param, Scalar, linear, seeded
from fastlora.match.rule import dtype_of, rule
from fastlora.rewrite.pipeline import rewrite

X = randn(2, 3, 16)


def layer(n: int, k: int, rank: int = 4, seed: int = 0, base: torch.dtype = f32) -> tuple[Tensor, Tensor, Tensor]:
    weight = randn(n, k, seed=seed, grad=False, dtype=base, scale=0.3)
    return weight, randn(rank, k, seed=seed + 1, scale=0.3), randn(n, rank, seed=seed + 2, scale=0.3)


@pytest.fixture(autouse=True)
def masks_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora.patterns.lora.is_cheap", lambda t: True)


def drawn(x: Tensor, w: Tensor, a: Tensor, b: Tensor, p: float = P) -> Tensor:
    """`lora` with dropout from a seed."""
    result = F.linear(x, w)
    return (result + F.linear(F.linear(drop(x.to(a.dtype), p), a), b) * 2.0).to(result.dtype)


def dropped(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return lora(x, w, a, b, p=P)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_dropout_of_an_adapter_becomes_a_seed(dtype: torch.dtype) -> None:
    outcome = check(
        dropped,
        drawn,
        X.detach().to(dtype).requires_grad_(),
        *layer(24, 16, base=dtype),
        ops=["lora_linear"],
        tolerance=2e-6 if dtype == f32 else 2e-2,
    )
    assert "dropout" not in outcome.targets()
    assert outcome.targets().count("randint") == 1
    arguments = outcome.chosen[0].arguments
    assert arguments.get("x_dropped") is None
    assert arguments["dropout"] == P


def test_autocast_is_supported() -> None:
    def under_autocast(function: Function) -> Function:
        def run(*given: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=bf16):
                return function(*given)

        return run

    check(under_autocast(dropped), under_autocast(drawn), X, *layer(24, 16), ops=["lora_linear"], tolerance=2e-2)


@pytest.mark.parametrize("trained", ["x", "a", "b", "w", "x a", "a b", "x b", "x w a b"])
def test_any_subset_of_tensors_may_be_trained(trained: str) -> None:
    tensors = dict(zip("xwab", (X, *layer(24, 16)), strict=True))
    inputs = [t.detach().requires_grad_(name in trained.split()) for name, t in tensors.items()]
    check(dropped, drawn, *inputs, ops=["lora_linear"])


def test_only_the_input_is_saved() -> None:
    gm, given = trace(lambda x, *w: dropped(x * 1.5, *w), (X, *layer(24, 16, rank=3)))
    rewrite(gm, default_rules())
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lower(gm, given, "eager", "default")(*given)
    assert len({t.data_ptr() for t in saved if t.numel() == X.numel()}) == 1


def test_seeds_are_drawn_in_the_order_of_the_masks() -> None:
    """Also among other random numbers; each run draws new seeds."""

    def function(draw: Callable[..., Tensor], adapted: Function) -> Function:
        def run(x: Tensor, *weights: Tensor) -> Tensor:
            x = x + draw(x)
            y = adapted(x, *weights[:3])
            y = y * draw(y)
            return adapted(y, *weights[3:])

        return run

    inputs = (X, *layer(24, 16), *layer(16, 24, seed=3))
    check(function(torch.rand_like, dropped), function(torch.rand_like, drawn), *inputs, ops=["lora_linear"] * 2)
    gm, given = trace(dropped, inputs[:4])
    rewrite(gm, default_rules())
    torch.manual_seed(1)
    first, second = gm(*given)[0], gm(*given)[0]
    torch.manual_seed(1)
    assert torch.equal(gm(*given)[0], first)
    assert not torch.equal(first, second)


def test_each_of_several_adapters_has_a_seed() -> None:
    def function(drop: Callable[..., Tensor]) -> Function:
        def run(x: Tensor, w: Tensor, a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, a3: Tensor, b3: Tensor) -> Tensor:
            result = F.linear(x, w)
            result = result + F.linear(F.linear(drop(x, 0.3), a), b) * 2.0
            result = result + F.linear(F.linear(x, a2), b2) * 3.0
            return result + F.linear(F.linear(drop(x, 0.5), a3), b3)

        return run

    inputs = (X, *layer(24, 16), *layer(24, 16, 3, seed=5)[1:], *layer(24, 16, 2, seed=7)[1:])
    outcome = check(function(F.dropout), function(drop), *inputs, ops=["lora_add", "lora_add", "lora_linear"])
    assert outcome.targets().count("randint") == 2


def test_lora_add_has_a_seed() -> None:
    def function(drop: Callable[..., Tensor]) -> Function:
        return lambda x, packed, a, b: x @ packed.float() + F.linear(F.linear(drop(x, P), a), b) * 2.0

    packed = torch.arange(384).remainder(17).sub(8).view(16, 24).to(torch.int8)
    outcome = check(function(F.dropout), function(drop), X, packed, *layer(24, 16)[1:], ops=["lora_add"])
    assert "dropout" not in outcome.targets()


@pytest.mark.parametrize("shares", [(P, P, P), (0.2, None, 0.5)], ids=str)
def test_each_member_of_a_group_has_a_seed(shares: tuple[float | None, ...]) -> None:
    """Seeds are drawn before the group's first result is used, since other dropouts may follow."""

    def function(adapted: Function) -> Function:
        def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            results = []
            for i, p in enumerate(shares):
                member = weights[3 * i : 3 * i + 3]
                results.append(torch.tanh(adapted(x, *member, p=p) if p else lora(x, *member)))
            return tuple(results)

        return run

    qkv = (*layer(24, 16), *layer(8, 16, 3, seed=3), *layer(8, 16, 2, seed=6))
    outcome = check(function(lora), function(drawn), X, *qkv, ops=["lora_group"])
    assert outcome.targets().count("randint") == sum(p is not None for p in shares)
    assert analyse(function(lora), X, *qkv, verify=True).ops == ["lora_group"]


def test_an_mlp_with_dropout_is_not_fused_as_one_op() -> None:
    """`lora_mlp` does not support dropout."""

    def function(adapted: Function) -> Function:
        def run(x: Tensor, *weights: Tensor) -> Tensor:
            gate, up = adapted(x, *weights[:3], p=P), adapted(x, *weights[3:6], p=P)
            return adapted(F.silu(gate) * up, *weights[6:], p=P)

        return run

    mlp = (*layer(24, 16), *layer(24, 16, seed=3), *layer(16, 24, seed=6))
    check(function(lora), function(drawn), X, *mlp, ops=["glu", "lora_group", "lora_linear"])


def test_dropout_with_other_readers_stays() -> None:
    """The op then takes it as `x_dropped`, with eager's random numbers."""

    def function(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        z = F.dropout(x, P)
        return F.linear(x, w) + F.linear(F.linear(z, a), b) * 2.0, z

    outcome = analyse(function, X, *layer(24, 16))
    assert outcome.ops == ["lora_linear"]
    assert outcome.chosen[0].arguments.get("seed") is None
    assert "randint" not in outcome.targets()
    outcome.assert_close(2e-6)


@pytest.mark.parametrize("p", [1.0, 1])
def test_dropout_of_everything_stays(p: float) -> None:
    outcome = analyse(lambda *given: lora(*given, p=p), X, *layer(24, 16))
    assert outcome.ops == ["lora_linear"]
    assert "dropout" in outcome.targets()
    outcome.assert_close(2e-6)


def test_dropout_of_a_rounded_input_stays() -> None:
    """The op does not round the input of its dropout."""

    def function(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w) + F.linear(F.linear(F.dropout(x.to(bf16), P), a), b) * 2.0

    weight, a, b = layer(24, 16)
    outcome = analyse(function, X, weight, a.detach().to(bf16), b.detach().to(bf16))
    assert outcome.ops == ["lora_linear"]
    assert outcome.chosen[0].arguments.get("seed") is None


def test_on_the_cpu_dropout_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    outcome = analyse(dropped, X, *layer(24, 16))
    assert "dropout" in outcome.targets()
    outcome.assert_close(2e-6)


@pytest.mark.parametrize("dimensions", [(0,), (1,), (0, 1)], ids=str)
def test_dynamic_batch_and_length_are_supported(dimensions: tuple[int, ...]) -> None:
    x = randn(2, 3, 16)
    for dimension in dimensions:
        torch._dynamo.mark_dynamic(x, dimension)
    outcome = analyse(dropped, x, *layer(24, 16), dynamic=None)
    assert outcome.ops == ["lora_linear"]
    assert "dropout" not in outcome.targets()
    assert_same(outcome.rewritten, evaluate(drawn, [x.clone().detach().requires_grad_(), *layer(24, 16)]))


# ---- checkpoints


def block(x: Tensor, *weights: Tensor) -> Tensor:
    return dropped(torch.tanh(dropped(x, *weights[:3])), *weights[3:])


def checkpointed(x: Tensor, *weights: Tensor) -> Tensor:
    return checkpoint(block, x, *weights, use_reentrant=False)


BLOCK = (X, *layer(24, 16), *layer(16, 24, seed=3))


def test_a_checkpoint_recomputes_with_the_same_seeds() -> None:
    plain, recomputed = analyse(block, *BLOCK), analyse(checkpointed, *BLOCK)
    for outcome in (plain, recomputed):
        assert outcome.ops == ["lora_linear"] * 2
        assert "dropout" not in outcome.targets()
    assert_same(recomputed.rewritten, plain.rewritten, 0)


@pytest.mark.parametrize("function", [block, checkpointed], ids=lambda f: f.__name__)
def test_aot_autograd_draws_each_seed_once(function: Function) -> None:
    """Its forward and backward of the rewritten graph use the same mask, recomputed or not."""
    assert_same(through_aot_autograd(function, *BLOCK), analyse(block, *BLOCK).rewritten)


@pytest.mark.parametrize("how", ["train", "checkpointing", "verified"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_model_trains_with_seeds(family: str, how: str) -> None:
    """Gradients with and without checkpoints are equal for equal random states."""
    results = []
    for recomputes in (False, how == "checkpointing"):
        model = build(family, dropout=0.1)
        if recomputes:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        fastlora.compile(model, verify=how == "verified")
        results.append(step(model, batch()))
        report = fastlora.report(model)
        assert report.coverage["lora"].fused == report.coverage["lora"].seen > 0
        assert not [miss for miss in report.missed if miss.reason.startswith("verification")]
        assert "torch.randint" in "\n".join(report.code.values())
    first, second = results
    assert relative(second.loss, first.loss) < 1e-6
    assert all(relative(second.gradients[name], g) < 5e-6 for name, g in first.gradients.items())


# ---- verification


def test_verification_uses_one_mask_for_both_sides() -> None:
    outcome = analyse(dropped, X, *layer(24, 16), verify=True)
    assert outcome.ops == ["lora_linear"]
    assert "verify" not in outcome.turned_down()


def test_verification_detects_another_probability() -> None:
    attrs: dict[str, Any] = {"lora_dtype": dtype_of(), "out_dtype": dtype_of(), "dropout": 0.25}

    @rule(ops.lora_add, attrs=attrs)
    def wrong(base, x, lora_a: Param(2), lora_b: Param(2), lora_bias: Opt[Param(1)], scaling: Scalar, _p: Scalar):
        z = seeded("seed", x, _p, where=lambda view, value: True)
        return base + linear(linear(z, lora_a), lora_b, lora_bias) * scaling

    outcome = analyse(dropped, X, *layer(24, 16), rules=[wrong], verify=True)
    assert not outcome.ops
    assert "verification failed" in outcome.turned_down()
    outcome.assert_identical()
