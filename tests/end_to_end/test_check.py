"""`fastlora.check` finds wrong compiled steps, accepts right ones, and restores all state."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from quantized_models import Format
from quantized_models import build as build_quantized
from tiny_models import batch, build
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.checking import check
from fastlora.kernels import ops
from fastlora.match.dsl import sigmoid
from fastlora.match.rule import dtype_of, rule

WIDTH = 16


@rule(ops.glu, anchor="sigmoid", attrs={"activation": "silu", "out_dtype": dtype_of()})
def wrongly_silu(gate, up):
    return (gate * sigmoid(1.702 * gate)) * up


class Gated(nn.Module):
    """A gated model with approximate GELU, running statistics, and every kind of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.norm, self.dropout = nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)
        self.calls, self.seen = 0, []
        self.draws = self.fails = False
        self.cuts_where_compiled: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.draws:
            torch.compiler.disable(self._draw)()
        x = self.norm(x)
        gate = self.gate(self.dropout(x))
        if torch.compiler.is_compiling() is self.cuts_where_compiled:
            gate = gate.detach()
        return self.down((gate * torch.sigmoid(1.702 * gate)) * self.up(x)).square().mean()

    def _draw(self) -> None:
        self.calls += 1
        self.seen.append(random.random() + numpy.random.rand() + float(torch.rand(())))
        if self.fails:
            raise ArithmeticError("on purpose")


@pytest.fixture
def gated() -> Gated:
    torch.manual_seed(0)
    return Gated()


def x() -> Tensor:
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))


# -- right steps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype", "dropout"),
    [("llama", torch.float32, 0.0), ("qwen3", torch.float32, 0.1), ("bert", torch.bfloat16, 0.0)],
)
def test_a_model_with_adapters_is_right(family: str, dtype: torch.dtype, dropout: float) -> None:
    model = build(family, dtype, dropout)
    found = fastlora.check(model, **batch(padded=True))
    assert found, str(found)
    assert found.compared == sum("lora_" in name for name, _ in model.named_parameters())
    assert found.loss.float64 is not None
    assert str(found).startswith("right: ")
    assert found.fused > 0
    assert not found.skipped
    assert not found.notes


def test_a_model_under_autocast_is_right() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = fastlora.check(build("llama"), **batch())
    assert found, str(found)


def test_autocast_is_off_in_float64() -> None:
    class Lowered(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.float(), self.weight.float()).square().mean()

    torch.manual_seed(0)
    model = Lowered(WIDTH, 24)
    with torch.autocast("cpu", torch.bfloat16):
        loss = fastlora.check(model, x=x()).loss
    assert loss.float64 != pytest.approx(loss.eager, rel=1e-4)
    assert loss.float64 == pytest.approx(float(model(x()).detach()), rel=1e-6)


def test_a_custom_model_is_right(gated: Gated) -> None:
    found = fastlora.check(gated, x=x())
    assert found, str(found)
    assert found.compared == 8


def test_gradients_need_not_be_enabled(gated: Gated) -> None:
    with torch.no_grad():
        assert fastlora.check(gated, x=x())


def test_quantized_weights_are_compared_with_eager_only() -> None:
    found = fastlora.check(build_quantized("llama", Format()), **batch())
    assert found, str(found)
    assert found.loss.float64 is None
    assert "Params4bit" in found.skipped[0]
    assert found.fused > 0
    assert all(each.eager_error is None and 0 < each.bound < 1e-3 for each in found.worst)


def test_reentrant_checkpoints_are_checked(gated: Gated) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner = nn.Linear(WIDTH, WIDTH), gated

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, self.first(x), use_reentrant=True)

    model = Checkpointed()
    found = fastlora.check(model, x=x())
    assert found, str(found)
    assert found.compared == 10
    assert all(p.grad is None for p in model.parameters())


def test_tied_weights_are_checked() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.out = nn.LSTM(WIDTH, 8), nn.Linear(8, WIDTH)  # it also has a list of its weights

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.recurrent(x)[0]).square().mean()

    found = fastlora.check(Recurrent(), x=x())
    assert found, str(found)
    assert found.compared == 6
    assert found.notes == ["nothing was compiled, so both steps ran eagerly"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_dropout_is_off() -> None:
    model = build("llama", dropout=0.1).cuda()
    inputs = {name: value.cuda() for name, value in batch().items()}
    states = torch.cuda.get_rng_state_all()
    found = fastlora.check(model, **inputs)
    assert found, str(found)
    assert found.loss.float64 is not None
    assert "dropout probabilities were 0" in found.notes[0]
    assert all(map(torch.equal, torch.cuda.get_rng_state_all(), states))


# -- wrong steps -------------------------------------------------------------------------------------------------------


def test_a_wrong_rule_is_found(gated: Gated) -> None:
    found = fastlora.check(gated, rules=[wrongly_silu], x=x())
    assert not found
    assert found.fused == 1
    assert str(found).startswith("wrong: ")
    named = {each.name for each in found.worst if not each.right}
    assert {"gate.weight", "up.weight", "down.weight", "the loss"} <= named
    assert all(f"{name}: error of eager" in str(found) for name in named)
    assert "fastlora.disable(model)" in str(found)


def test_a_wrong_rule_is_found_without_float64(gated: Gated, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "_free_on_host", lambda: 0)
    found = fastlora.check(gated, rules=[wrongly_silu], x=x())
    assert not found
    assert "MiB" in found.skipped[0]
    assert fastlora.check(gated, x=x())


def test_the_tolerance_is_the_allowed_error(gated: Gated) -> None:
    assert fastlora.check(gated, rules=[wrongly_silu], tolerance=1.0, x=x())


@pytest.mark.parametrize("compiled", [True, False])
def test_a_gradient_in_only_one_step_is_found(gated: Gated, compiled: bool) -> None:
    gated.cuts_where_compiled = compiled
    found = fastlora.check(gated, x=x())
    assert not found
    names = ["gate.bias", "gate.weight"]
    assert (found.missing, found.extra) == ((names, []) if compiled else ([], names))
    assert f"gate.weight: got a gradient in the {'eager' if compiled else 'compiled'} step alone" in str(found)


def test_overflow_is_right_where_eager_overflows(gated: Gated) -> None:
    gated.down.weight.data[0, 0] = 1e30
    assert not torch.isfinite(gated(x()))
    found = fastlora.check(gated, x=x())
    assert found, str(found)
    loss = json.loads(found.to_json(), parse_constant=pytest.fail)["loss"]
    assert (loss["eager"], loss["compiled"]) == (None, None)
    assert any("the loss is not finite" in note for note in found.notes)


# -- batches without a loss --------------------------------------------------------------------------------------------


def test_a_batch_without_labels_is_refused() -> None:
    inputs = batch()
    del inputs["labels"]
    with pytest.raises(fastlora.FastLoRAError, match="pass labels"):
        fastlora.check(build("llama"), **inputs)


def test_loss_fn_computes_the_loss_from_the_output() -> None:
    inputs = batch()
    labels = inputs.pop("labels")

    def loss(output: Any) -> Tensor:
        return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model = build("llama")
    found = fastlora.check(model, loss_fn=loss, **inputs)
    assert found, str(found)
    assert found.loss.eager == pytest.approx(float(model(**inputs, labels=labels).loss))


def test_a_model_that_trains_nothing_is_refused(gated: Gated) -> None:
    gated.requires_grad_(False)
    with pytest.raises(fastlora.FastLoRAError, match="require"):
        fastlora.check(gated, x=x())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nn.DataParallel, "model.module"),
        (lambda model: model.to("meta"), "load the weights"),
        (lambda model: [model], "model must be an nn.Module; got a list"),
        (torch.compile, "_orig_mod"),
        (lambda model: _sharded(model), "before it is sharded"),
    ],
)
def test_a_model_that_cannot_be_checked_is_refused(gated: Gated, change: Any, message: str) -> None:
    with pytest.raises(fastlora.FastLoRAError, match=message):
        fastlora.check(change(gated), x=x())


def _sharded(model: Gated) -> Gated:
    class Shard(nn.Parameter):
        pass

    model.up.weight = Shard(model.up.weight.detach())
    return model


# -- restored state ----------------------------------------------------------------------------------------------------


def state(model: nn.Module) -> dict[str, Any]:
    """Return all state that must not change, by identity or by value."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "tensors": {name: id(t) for name, t in tensors.items()},
        "values": {name: t.detach().clone() for name, t in tensors.items()},
        "versions": {name: t._version for name, t in tensors.items()},
        "gradients": {
            name: (id(p.grad), None if p.grad is None else p.grad.clone()) for name, p in model.named_parameters()
        },
        "modes": [module.training for module in model.modules()],
        "slots": [id(module._compiled_call_impl) for module in model.modules()],
        "hooks": [list(module._forward_hooks) for module in model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()),
    }


def assert_same(now: Any, before: Any) -> None:
    if isinstance(before, Tensor):
        assert torch.equal(now, before)
    elif isinstance(before, dict):
        assert list(now) == list(before)
        for name in before:
            assert_same(now[name], before[name])
    elif isinstance(before, (list, tuple)):
        assert len(now) == len(before)
        for one, other in zip(now, before, strict=True):
            assert_same(one, other)
    else:
        assert now == before


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_check_restores_all_state(gated: Gated, compiled: bool, fails: bool) -> None:
    gated(x()).backward()
    if compiled:
        fastlora.compile(gated)
    gated.draws, gated.fails = True, fails
    hooked = []
    for parameter in gated.parameters():  # like an optimizer that steps in the backward
        parameter.register_post_accumulate_grad_hook(hooked.append)
    gated.norm.eval()
    gated.norm.train()
    before, held = state(gated), copy.copy(vars(gated))
    given = x().requires_grad_()
    if fails:
        with pytest.raises(ArithmeticError, match="on purpose"):
            fastlora.check(gated, x=given * 2)
    else:
        assert fastlora.check(gated, x=given * 2)
    assert_same(state(gated), before)
    assert vars(gated) == held
    assert (gated.calls, gated.seen, hooked, given.grad) == (0, [], [], None)


def test_a_failing_compilation_restores_all_state(gated: Gated) -> None:
    @rule(ops.glu, anchor="sigmoid", attrs={"activation": _failing, "out_dtype": dtype_of()})
    def failing(gate, up):
        return (gate * sigmoid(1.702 * gate)) * up

    before = state(gated)
    with pytest.raises(Exception, match="on purpose"):
        fastlora.check(gated, rules=[failing], x=x())
    assert_same(state(gated), before)


def _failing(match: Any) -> str:
    raise ArithmeticError("on purpose")


def test_a_model_trains_on_after_a_check(gated: Gated) -> None:
    other = copy.deepcopy(gated)
    for model in (gated, other):
        torch.manual_seed(3)
        fastlora.compile(model)
        if model is gated:
            assert fastlora.check(model, x=x())
        model(x()).backward()
    for mine, its in zip(gated.parameters(), other.parameters(), strict=True):
        assert torch.equal(mine.grad, its.grad)


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (({"input_ids": 1},), {}, r"fastlora\.check\(model, \*\*batch\); got dict by position"),
        ((), {"tolerance": "x"}, "tolerance must be a positive number, such as 1e-3, or None; got 'x'"),
        ((), {"tolerance": -1.0}, r"tolerance must be a positive number.*; got -1\.0"),
        ((), {"loss_fn": 5}, "loss_fn must be a function .*; got 5"),
        ((), {"defer_logits": "no"}, "defer_logits must be True or False; got 'no'"),
    ],
)
def test_an_invalid_argument_is_named_with_its_value(arguments, options, words):
    with pytest.raises(fastlora.FastLoRAError, match=words):
        fastlora.check(nn.Linear(2, 2), *arguments, **options)
