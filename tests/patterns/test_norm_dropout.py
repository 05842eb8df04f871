"""Dropout of a branch before a residual addition and a norm is fused, from a seed that the graph draws, as on a GPU;
the device check is patched here."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import Function, Outcome, analyse, bf16, evaluate, f32, randn, trace
from seeded_dropout import P, assert_same, check, drop, through_aot_autograd
from tiny_models import FAMILIES, batch, relative, step
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.frontend.session import default_rules
from fastlora.kernels import ops
from fastlora.lower.lowering import lower
from fastlora.match.dsl import Scalar, raised, seeded
from fastlora.match.rule import fuse
from fastlora.rewrite.pipeline import rewrite

X, Y, W = randn(2, 3, 16), randn(2, 3, 16, seed=1), randn(16)


def rms(x: Tensor, w: Tensor) -> Tensor:
    h = x.float()
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def layer(x: Tensor, w: Tensor) -> Tensor:
    return F.layer_norm(x, (16,), w, w * 2, 1e-5)


NORMS = {"add_rms_norm": rms, "add_layer_norm": layer}


@pytest.fixture(autouse=True)
def masks_are_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora.patterns.lora.is_cheap", lambda t: True)


def summed(norm: Function, drop: Callable[..., Tensor], left: bool = False, ends: bool = False) -> Function:
    """Return a norm of the sum of a residual and x with dropout."""

    def run(x: Tensor, y: Tensor, w: Tensor) -> Any:
        total = drop(x, P) + y if left else y + drop(x, P)
        return norm(total, w) if ends else (norm(total, w), total)

    return run


def assert_stays(outcome: Outcome, op: str) -> None:
    """Assert that the sum is fused, but its dropout stays in the graph."""
    assert outcome.ops == [op]
    assert outcome.chosen[0].arguments.get("seed") is None
    assert "randint" not in outcome.targets()
    outcome.assert_close(2e-6)


@pytest.mark.parametrize("ends", [False, True], ids=["sum is used", "sum is not used"])
@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("op", NORMS)
def test_dropout_of_a_branch_becomes_a_seed(op: str, left: bool, ends: bool) -> None:
    """On either side of the addition."""
    norm = NORMS[op]
    outcome = check(summed(norm, F.dropout, left, ends), summed(norm, drop, left, ends), X, Y, W, ops=[op])
    assert "dropout" not in outcome.targets()
    assert outcome.targets().count("randint") == 1
    arguments = outcome.chosen[0].arguments
    assert arguments["dropout"] == P
    assert str(arguments["x"]) == "l_x_"


@pytest.mark.parametrize("op", NORMS)
def test_half_precision_rounds_like_eager(op: str) -> None:
    """The sum equals eager's bit for bit for the same mask."""
    inputs = [t.detach().to(bf16).requires_grad_() for t in (X, Y, W)]
    outcome = check(summed(NORMS[op], F.dropout), summed(NORMS[op], drop), *inputs, ops=[op], tolerance=1e-2)
    assert torch.equal(outcome.rewritten.outputs[1], evaluate(summed(NORMS[op], drop), inputs).outputs[1])


@pytest.mark.parametrize("trained", ["x", "y", "x y", "x w", "y w"])
@pytest.mark.parametrize("op", NORMS)
def test_any_subset_of_tensors_may_be_trained(op: str, trained: str) -> None:
    given = {"x": X, "y": Y, "w": W}
    inputs = [t.detach().requires_grad_(name in trained.split()) for name, t in given.items()]
    check(summed(NORMS[op], F.dropout), summed(NORMS[op], drop), *inputs, ops=[op])


@pytest.mark.parametrize("op", NORMS)
def test_dropout_saves_no_activation(op: str) -> None:
    """The only saved tensor of the sum's size is the sum, as without dropout."""
    gm, given = trace(summed(NORMS[op], F.dropout), (X, Y, W))
    rewrite(gm, default_rules())
    saved: list[Tensor] = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lower(gm, given, "eager", "default")(*given)
    assert len({t.data_ptr() for t in saved if t.numel() == X.numel()}) == 1


@pytest.mark.parametrize("op", NORMS)
def test_one_of_two_dropouts_becomes_a_seed(op: str) -> None:
    def function(drop: Callable[..., Tensor]) -> Function:
        def run(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
            return NORMS[op](F.dropout(x, 0.2) + drop(y, P), w)

        return run

    outcome = check(function(F.dropout), function(drop), X, Y, W, ops=[op])
    assert outcome.targets().count("dropout") == outcome.targets().count("randint") == 1


@pytest.mark.parametrize("op", NORMS)
def test_a_value_may_be_added_to_its_own_dropout(op: str) -> None:
    def function(drop: Callable[..., Tensor]) -> Function:
        return lambda x, w: NORMS[op](drop(x, P) + x, w)

    outcome = check(function(F.dropout), function(drop), X, W, ops=[op])
    assert "dropout" not in outcome.targets()


def test_seeds_of_a_chain_of_blocks_are_drawn_in_order() -> None:
    """In place of the masks, among other random numbers."""

    def function(drop: Callable[..., Tensor]) -> Function:
        def run(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
            for norm in (rms, layer, rms):
                x = norm(x + drop(torch.tanh(x * y), P), w)
                x = x + torch.rand_like(x)
            return x

        return run

    ops_ = ["add_layer_norm", "add_rms_norm", "add_rms_norm"]
    outcome = check(function(F.dropout), function(drop), X, Y, W, ops=ops_)
    assert "dropout" not in outcome.targets()


def test_dropouts_of_adapter_and_branch_have_separate_seeds() -> None:
    def function(drop: Callable[..., Tensor]) -> Function:
        def run(x: Tensor, y: Tensor, w: Tensor, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
            out = F.linear(x, base) + F.linear(F.linear(drop(x, 0.3), a), b) * 2.0
            return layer(drop(out, P) + y, w)

        return run

    weights = randn(16, 16, grad=False), randn(4, 16, scale=0.3), randn(16, 4, scale=0.3)
    outcome = check(function(F.dropout), function(drop), X, Y, W, *weights, ops=["add_layer_norm", "lora_linear"])
    assert outcome.targets().count("randint") == 2


# ---- dropouts that stay


@pytest.mark.parametrize("op", NORMS)
def test_dropout_with_other_readers_stays(op: str) -> None:
    def function(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        z = F.dropout(x, P)
        return NORMS[op](z + y, w), z

    assert_stays(analyse(function, X, Y, W), op)


@pytest.mark.parametrize("twice", [lambda z: z + z, lambda z: z + z.view(2, 3, 16)], ids=["itself", "view"])
@pytest.mark.parametrize("op", NORMS)
def test_dropout_added_to_itself_stays(op: str, twice: Function) -> None:
    """Both operands share a mask."""
    assert_stays(analyse(lambda x, w: NORMS[op](twice(F.dropout(x, P)), w), X, W), op)


@pytest.mark.parametrize("p", [1.0, 1])
def test_dropout_of_everything_stays(p: float) -> None:
    assert_stays(analyse(lambda x, y, w: layer(F.dropout(x, p) + y, w), X, Y, W), "add_layer_norm")


def test_dropout_in_another_dtype_stays() -> None:
    """A dropout in float32 is rounded afterwards, the op would round before."""

    def function(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return rms(F.dropout(x.float(), P).to(bf16) + y, w)

    outcome = analyse(function, *(t.detach().to(bf16).requires_grad_() for t in (X, Y, W)))
    assert outcome.ops == ["add_rms_norm"]
    assert outcome.chosen[0].arguments.get("seed") is None
    assert "dropout" in outcome.targets()


def test_dropout_of_a_mutated_branch_stays() -> None:
    def function(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        x = x * 2
        z = F.dropout(x, P)
        x.add_(1)
        return layer(z + y * x, w)

    outcome = analyse(function, X, Y, W)
    assert "randint" not in outcome.targets()
    outcome.assert_close(2e-6)


def test_dropout_of_a_broadcast_branch_stays() -> None:
    outcome = analyse(summed(layer, F.dropout), randn(1, 3, 16), Y, W)
    assert outcome.ops == ["layer_norm"]
    assert "the operands of the sum differ in shape or dtype" in outcome.turned_down()
    outcome.assert_close(2e-6)


@pytest.mark.parametrize("op", NORMS)
def test_on_the_cpu_dropout_stays(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    outcome = analyse(summed(NORMS[op], F.dropout), X, Y, W)
    assert "dropout" in outcome.targets()
    assert_stays(outcome, op)


def test_the_trace_says_why_dropout_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def reasons(function: Function) -> list[str]:
        made = analyse(function, X, Y, W).rewrites[0]
        match = next(m for m in made.chosen if m.op is ops.add_layer_norm)
        return [reason for _, reason in match.rule.trace(match.view, match.root).notes]

    def used_twice(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        z = F.dropout(x, P)
        return layer(z + y, w), z

    assert any("has other uses" in reason for reason in reasons(used_twice))
    monkeypatch.undo()
    assert any("no kernel on its device" in reason for reason in reasons(summed(layer, F.dropout)))


# ---- lengths, layouts, checkpoints, models


@pytest.mark.parametrize("dimensions", [(0,), (1,), (0, 1)], ids=str)
@pytest.mark.parametrize("op", NORMS)
def test_dynamic_batch_and_length_are_supported(op: str, dimensions: tuple[int, ...]) -> None:
    inputs = [randn(2, 3, 16), randn(2, 3, 16, seed=1), W]
    for t, dimension in [(t, d) for t in inputs[:2] for d in dimensions]:
        torch._dynamo.mark_dynamic(t, dimension)
    outcome = analyse(summed(NORMS[op], F.dropout), *inputs, dynamic=None)
    assert outcome.ops == [op]
    assert "dropout" not in outcome.targets()
    assert_same(outcome.rewritten, evaluate(summed(NORMS[op], drop), (X, Y, W)))


@pytest.mark.parametrize("turned", ["x", "y", "x y"])
def test_any_layout_is_supported(turned: str) -> None:
    """The sum has the strides of eager's."""

    def function(drop: Callable[..., Tensor]) -> Function:
        def run(x: Tensor, y: Tensor, w: Tensor) -> Any:
            x = x.transpose(0, 1).contiguous().transpose(0, 1) * 1.5 if "x" in turned else x
            y = y.transpose(0, 1).contiguous().transpose(0, 1) * 1.5 if "y" in turned else y
            total = y + drop(x, P)
            return rms(total, w), total

        return run

    def preserving(x: Tensor, p: float) -> Tensor:
        return torch.empty_like(x).copy_(drop(x, p))

    outcome = check(function(F.dropout), function(preserving), X, Y, W, ops=["add_rms_norm"])
    assert outcome.rewritten.outputs[1].stride() == outcome.eager.outputs[1].stride()


def block(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    return layer(x + F.dropout(torch.tanh(rms(x + F.dropout(y, P), w)), P), w)


def test_a_checkpoint_recomputes_with_the_same_seeds() -> None:
    def checkpointed(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
        return checkpoint(block, x, y, w, use_reentrant=False)

    plain, recomputed = analyse(block, X, Y, W), analyse(checkpointed, X, Y, W)
    for outcome in (plain, recomputed):
        assert outcome.ops == ["add_layer_norm", "add_rms_norm"]
        assert "dropout" not in outcome.targets()
    assert_same(recomputed.rewritten, plain.rewritten, 0)


def test_aot_autograd_draws_each_seed_once() -> None:
    """Its forward and backward of the rewritten graph use the same mask."""
    assert_same(through_aot_autograd(block, X, Y, W), analyse(block, X, Y, W).rewritten)


def bert(p: float) -> torch.nn.Module:
    """Return a BERT with hidden dropout and adapters."""
    import transformers
    from peft import LoraConfig, get_peft_model

    name, settings = FAMILIES["bert"]
    torch.manual_seed(0)
    config = getattr(transformers, name).config_class(
        **settings, hidden_dropout_prob=p, attention_probs_dropout_prob=0.0
    )
    model = get_peft_model(
        getattr(transformers, name)(config), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0)
    )
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.normal_(std=0.1)
    return model


@pytest.mark.parametrize("how", ["train", "checkpointing", "verified"])
def test_bert_trains_with_seeds(how: str) -> None:
    """Gradients with and without checkpoints are equal for equal random states."""
    results = []
    for recomputes in (False, how == "checkpointing"):
        model = bert(0.1)
        if recomputes:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        fastlora.compile(model, verify=how == "verified")
        results.append(step(model, batch()))
        report = fastlora.report(model)
        assert not [miss for miss in report.missed if miss.reason.startswith("verification")]
        code = "\n".join(report.code.values())
        assert code.count("torch.randint") == len(re.findall(r"= \S*add_layer_norm\w*\(", code)) > 0
    first, second = results
    assert relative(second.loss, first.loss) < 1e-6
    assert all(relative(second.gradients[name], g) < 5e-6 for name, g in first.gradients.items())


# ---- verification


@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_verification_uses_one_mask_for_both_sides(op: str, dtype: torch.dtype) -> None:
    inputs = [t.detach().to(dtype).requires_grad_() for t in (X, Y, W)]
    outcome = analyse(summed(NORMS[op], F.dropout), *inputs, verify=True)
    assert outcome.ops == [op]
    assert "verify" not in outcome.turned_down()
    assert "dropout" not in outcome.targets()


def test_verification_detects_another_probability() -> None:
    @fuse(ops.add_layer_norm, attrs={"dropout": 0.25})
    def wrong(residual, x, _p: Scalar):
        total = residual + seeded("seed", x, _p, where=lambda view, value: True)
        return raised(ops.layer_norm, x=total), total

    alone = [r for r in default_rules() if r.name == "layer_norm"]
    outcome = analyse(summed(layer, F.dropout), X, Y, W, rules=[*alone, wrong], verify=True)
    assert outcome.ops == ["layer_norm"]
    assert "verification failed" in outcome.turned_down()
