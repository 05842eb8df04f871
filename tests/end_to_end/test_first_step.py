"""A model whose first step is checked trains as without the check, or, if the step is wrong, as in eager mode."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import batch, build
from torch import Tensor, nn

import fastlora
from fastlora.checking.check import FirstStep
from fastlora.kernels import ops
from fastlora.match.dsl import sigmoid
from fastlora.match.rule import dtype_of, rule

WIDTH = 16


@rule(ops.glu, anchor="sigmoid", attrs={"activation": "silu", "out_dtype": dtype_of()})
def wrongly_silu(gate, up):
    return (gate * sigmoid(1.702 * gate)) * up


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)
        self.norm, self.dropout = nn.BatchNorm1d(WIDTH), nn.Dropout(0.2)

    def forward(self, x: Tensor, labels: Any = None) -> Tensor:
        x = self.dropout(self.norm(x))
        gate = self.gate(x)
        y = (gate * torch.sigmoid(1.702 * gate)) * self.up(x)
        return y if labels is None else (y - labels).square().mean()


def gated() -> Gated:
    torch.manual_seed(0)
    return Gated()


def x() -> Tensor:
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))


def compiled(model: Any, **options: Any) -> FirstStep:
    """Compile the model with a check of its first step; return that check."""
    first: FirstStep = fastlora.compile(model, verify="first-step", **options)._compiled_call_impl._first_step
    return first


def trained(model: nn.Module, autocast: bool, steps: int = 3, **inputs: Any) -> Iterator[Tensor]:
    """Return losses, gradients and random states of some steps that update the weights."""
    torch.manual_seed(5)
    for _ in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output = model(**inputs)
        loss = output if isinstance(output, Tensor) else output.loss
        loss.backward()
        yield from (loss.detach(), torch.get_rng_state())
        for parameter in model.parameters():
            if parameter.grad is not None:
                yield parameter.grad.clone()
                parameter.data -= 0.1 * parameter.grad
    yield from (buffer.clone() for buffer in model.buffers())


@pytest.mark.parametrize("autocast", [False, True])
def test_a_right_step_changes_nothing(autocast: bool) -> None:
    models = [build("llama", dropout=0.1) for _ in range(2)]
    first = compiled(models[0])
    fastlora.compile(models[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "verify=")
        mine, its = (list(trained(model, autocast, **batch())) for model in models)
    assert first.agreement
    assert len(mine) == len(its) > 100
    assert all(torch.equal(one, other) for one, other in zip(mine, its, strict=True))
    reports = [fastlora.report(model) for model in models]
    assert reports[0].graphs == reports[1].graphs > 0
    assert reports[0].coverage == reports[1].coverage
    (note, *notes) = reports[0].notes
    assert note.startswith("the first step was checked. right: ")
    assert notes == reports[1].notes


def test_checking_changes_no_batch_statistics() -> None:
    models = [gated(), gated()]
    first = compiled(models[0])
    fastlora.compile(models[1])
    mine, its = (list(trained(model, False, x=x(), labels=1.0)) for model in models)
    assert first.agreement
    assert all(torch.equal(one, other) for one, other in zip(mine, its, strict=True))


def test_the_report_counts_the_steps_of_the_training_alone() -> None:
    from transformers import DynamicCache

    models = [build("llama") for _ in range(2)]
    first = compiled(models[0])
    fastlora.compile(models[1])
    for model in models:
        model(**batch(), past_key_values=DynamicCache()).loss.backward()  # layers do not run compiled under it
    assert first.agreement
    (_, *notes), its = (fastlora.report(model).notes for model in models)
    assert notes == its
    assert "calls ran uncompiled" in notes[0]


def test_after_a_wrong_step_the_model_runs_eagerly() -> None:
    models = [gated(), gated()]
    first = compiled(models[0], rules=[wrongly_silu])
    with pytest.warns(UserWarning, match=r"continues in eager mode(.|\n)*gate.weight: error"):
        mine = list(trained(models[0], False, x=x(), labels=1.0))
    assert not first.agreement
    assert all(module._compiled_call_impl is None for module in models[0].modules())
    its = list(trained(models[1], False, x=x(), labels=1.0))
    assert all(torch.equal(one, other) for one, other in zip(mine, its, strict=True))


def test_a_check_does_not_free_the_graph_of_its_arguments() -> None:
    model, given = gated(), x().requires_grad_()
    first = compiled(model)
    model(given.exp(), labels=1.0).backward()  # a check must not free its graph
    assert first.agreement
    expected = x().requires_grad_()
    gated()(expected.exp(), labels=1.0)
    assert given.grad is not None


def test_calls_without_gradients_are_not_checked() -> None:
    model = gated()
    first = compiled(model)
    with torch.no_grad():
        model(x(), labels=1.0)
    assert first.agreement is None
    model(x(), labels=1.0)
    assert first.agreement


def test_the_check_waits_for_a_call_with_a_loss() -> None:
    model = gated()
    first = compiled(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "verify=")
        model(x())
        model(x(), labels=1.0)
    assert first.agreement

    first = compiled(model)
    model(x())
    model(x())
    with pytest.warns(UserWarning, match="no step was checked"):
        model(x())
    model(x(), labels=1.0)
    assert first.agreement is None


def test_a_step_that_cannot_be_checked_stays_compiled() -> None:
    model = gated()
    first = compiled(model)
    with pytest.warns(UserWarning, match="could not be checked"):
        model(x(), labels=_Unique())
    assert first.agreement is None
    assert fastlora.report(model).coverage


class _Unique:
    """A number that cannot be copied."""

    def __rsub__(self, other: Tensor) -> Tensor:
        return other - 1.0

    def __deepcopy__(self, _: Any) -> Any:
        raise TypeError("on purpose")
