"""Programs over logits have the same values, gradients and errors with ordinary and with deferred logits."""

from __future__ import annotations

import copy
from typing import Any

import logit_programs as lp
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import fastlora
from fastlora.frontend.head_gate import HeadGate
from fastlora.frontend.session import Options, Session


class Adapted(nn.Module):
    """A head with an adapter, which is a region by itself."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.base = head
        self.a, self.b = nn.Linear(lp.WIDTH, 2, bias=False), nn.Linear(2, lp.VOCABULARY, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x)) * 2.0


def _build(bias: bool, frozen: bool) -> tuple[torch.Tensor, nn.Linear]:
    torch.manual_seed(1)
    hidden = torch.randn(*lp.ROWS, lp.WIDTH, requires_grad=True)
    head = nn.Linear(lp.WIDTH, lp.VOCABULARY, bias=bias).requires_grad_(not frozen)
    return hidden, head


def _same(found: Any, expected: Any) -> bool:
    if not isinstance(expected, torch.Tensor) or not isinstance(found, torch.Tensor):
        return type(found) is type(expected) and found == expected
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        return False
    mine, its = found.double(), expected.double()
    finite = torch.isfinite(its)
    if not torch.equal(finite, torch.isfinite(mine)):
        return False
    bound = 2e-3 if expected.dtype is torch.float16 else 2e-5
    zero = torch.zeros(())
    return bool(torch.allclose(torch.where(finite, mine, zero), torch.where(finite, its, zero), rtol=bound, atol=bound))


def compare(program: list[Any], hidden: torch.Tensor, head: nn.Module, deferred_head: Any, copies: nn.Module) -> None:
    """Compare a program on deferred logits and on `head`, whose logits must not be a view, as those of a linear layer
    with a bias."""
    parameters = [p for p in head.parameters() if p.requires_grad]
    mirrored = [p for p in copies.parameters() if p.requires_grad]
    expected = lp.run(program, hidden, lambda h: head(h).clone(), parameters)
    found = lp.run(program, hidden.detach().clone().requires_grad_(), deferred_head, mirrored)
    assert found.get("error") == expected.get("error")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert _same(found[name], value), f"{name}: {found[name]} instead of {value}"


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(program=lp.programs, bias=st.booleans(), frozen=st.booleans())
def test_programs_over_the_logits_of_a_plain_head(program: list[Any], bias: bool, frozen: bool) -> None:
    hidden, head = _build(bias, frozen)
    copied = copy.deepcopy(head)
    compare(program, hidden, head, HeadGate(copied, Session(Options())), copied)


@pytest.fixture(scope="module")
def adapted() -> tuple[nn.Module, nn.Module]:
    """Return a model with an adapter on its head, eager and compiled."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2))
            self.head = Adapted(nn.Linear(lp.WIDTH, lp.VOCABULARY, bias=False).requires_grad_(False))

        def get_output_embeddings(self) -> nn.Module:
            return self.head

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(x)

    torch.manual_seed(0)
    eager = Model()
    return eager, fastlora.compile(copy.deepcopy(eager))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(program=lp.programs)
def test_programs_over_the_logits_of_an_adapted_head(adapted: tuple[nn.Module, nn.Module], program: list[Any]) -> None:
    eager, compiled = adapted
    eager.zero_grad()
    compiled.zero_grad()
    hidden, _ = _build(False, False)
    compare(program, hidden, eager.head, compiled.head, compiled.head)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(program=lp.programs)
def test_programs_over_logits_that_escape_a_graph(whole: tuple[nn.Module, Any], program: list[Any]) -> None:
    """The model is traced whole, with a loss on the same logits inside."""
    eager, run = whole
    gradients = []
    hidden, _ = _build(False, False)
    for model, forward in ((eager, eager), (eager, run)):
        model.zero_grad()
        x = hidden.detach().clone().requires_grad_()
        result = lp.run(program, x, lambda h, forward=forward: forward(h)[1], list(model.parameters()))
        gradients.append(result)
    expected, found = gradients
    assert found.get("error") == expected.get("error")
    for name, value in expected.items():
        assert _same(found[name], value), f"{name}: {found[name]} instead of {value}"


@pytest.fixture(scope="module")
def whole() -> tuple[nn.Module, Any]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(lp.WIDTH, lp.VOCABULARY, bias=False)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            z = self.head(x)
            labels = torch.arange(6) % lp.VOCABULARY
            return torch.nn.functional.cross_entropy(z.view(-1, lp.VOCABULARY), labels), z

    torch.manual_seed(0)
    model = Model()
    return model, torch.compile(model, backend="fastlora")
