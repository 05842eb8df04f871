"""Adapters as people write them by hand: one product of low rank beside a layer, however it is spelled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import analyse, assert_as_exact, bf16, randn
from torch import Tensor

X = randn(2, 3, 16)
W, A, B = randn(24, 16, grad=False, scale=0.3), randn(4, 16, scale=0.3), randn(24, 4, scale=0.3)
FLAT = randn(6, 16)
DOWN, UP = randn(16, 4, scale=0.3), randn(4, 24, scale=0.3)
BIAS = randn(24, grad=False)
Function = Callable[..., Any]


def low(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.linear(x, a), b)


def added_in_place(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    y = F.linear(x, w)
    y += low(x, a, b) * 2.0
    return y


def added_by_method(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w).add_(low(x, a, b), alpha=2.0)


def scaled_in_place(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    update = low(x, a, b)
    update *= 2.0
    return F.linear(x, w) + update


SCALED: dict[str, Function] = {
    "divided": lambda x, w, a, b: F.linear(x, w) + low(x, a, b) / 0.5,
    "scaled between A and B": lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a) * 2.0, b),
    "scaled input": lambda x, w, a, b: F.linear(x, w) + low(x * 2.0, a, b),
    "scaled twice": lambda x, w, a, b: F.linear(x, w) + low(x, a, b) * 4.0 * 0.5,
    "scaled everywhere": lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x * 4.0, a) / 2.0, b) * 1.0,
    "negated": lambda x, w, a, b: F.linear(x, w) + -low(x, a, b),
    "alpha": lambda x, w, a, b: torch.add(F.linear(x, w), low(x, a, b), alpha=2),
    "added in place": added_in_place,
    "added by a method": added_by_method,
    "scaled in place": scaled_in_place,
    "einsum": lambda x, w, a, b: (
        F.linear(x, w) + torch.einsum("bsr,or->bso", torch.einsum("bsi,ri->bsr", x, a), b) * 2.0
    ),
    "einsum with the weight first": lambda x, w, a, b: (
        F.linear(x, w) + 2.0 * torch.einsum("or, bsr -> bso", b, torch.einsum("ri, bsi -> bsr", a, x))
    ),
    "merged": lambda x, w, a, b: F.linear(x, w + 2.0 * (b @ a)),
    "merged with a transposed product": lambda x, w, a, b: F.linear(x, w + (a.t() @ b.t()).t() / 0.5),
}
UNTRANSPOSED: dict[str, Function] = {
    "matmul": lambda x, w, down, up: F.linear(x, w) + (x @ down @ up) * 2.0,
    "matmul of the base, too": lambda x, w, down, up: x @ w.t() + (x @ down) @ up,
    "einsum": lambda x, w, down, up: F.linear(x, w) + torch.einsum("bsr,ro->bso", x @ down, up),
    "merged": lambda x, w, down, up: F.linear(x, w + 2.0 * (down @ up).T),
}
FLAT_ONES: dict[str, Function] = {
    "mm": lambda x, w, down, up: torch.mm(x, w.t()) + torch.mm(torch.mm(x, down), up) * 2.0,
    "addmm": lambda x, w, down, up: torch.addmm(F.linear(x, w), x @ down, up, alpha=2.0),
    "addmm in place": lambda x, w, down, up: F.linear(x, w).addmm_(x @ down, up),
    "addmm as a layer": lambda x, w, down, up: torch.addmm(w[:, 0], x, w.t()) + x @ down @ up,
}


def assert_one_op(function: Function, *inputs: Tensor, op: str = "lora_linear") -> None:
    outcome = analyse(function, *inputs, verify=True)
    assert outcome.ops == [op], outcome.missed()
    assert not outcome.misses
    outcome.assert_tidy()
    outcome.assert_close(3e-6)


@pytest.mark.parametrize("spelling", SCALED)
def test_scales_and_sums_may_be_anywhere(spelling: str) -> None:
    assert_one_op(SCALED[spelling], X, W, A, B)


@pytest.mark.parametrize("spelling", UNTRANSPOSED)
def test_weights_may_be_stored_untransposed(spelling: str) -> None:
    assert_one_op(UNTRANSPOSED[spelling], X, W, DOWN, UP)


@pytest.mark.parametrize("spelling", FLAT_ONES)
def test_products_of_matrices_are_layers(spelling: str) -> None:
    op = "lora_add" if spelling == "addmm as a layer" else "lora_linear"
    assert_one_op(FLAT_ONES[spelling], FLAT, W, DOWN, UP, op=op)


@pytest.mark.parametrize("spelling", SCALED)
def test_no_spelling_is_less_exact_than_eager(spelling: str) -> None:
    inputs = [t.detach().to(bf16).requires_grad_(t.requires_grad) for t in (X, W, A, B)]
    outcome = analyse(SCALED[spelling], *inputs)
    assert outcome.ops == ["lora_linear"], outcome.missed()
    assert_as_exact(outcome, SCALED[spelling], inputs)


GAINS: dict[str, tuple[Function, Tensor]] = {
    "a buffer": (lambda x, w, a, b, s: F.linear(x, w) + low(x, a, b) * s, torch.tensor(2.0)),
    "a learned scalar": (
        lambda x, w, a, b, s: F.linear(x, w) + low(x, a, b) * s,
        torch.tensor(2.0, requires_grad=True),
    ),
    "a learned scalar and a number": (
        lambda x, w, a, b, s: F.linear(x, w) + 0.5 * F.linear(s * F.linear(x, a), b),
        torch.tensor(2.0, requires_grad=True),
    ),
    "a learned scalar, twice": (
        lambda x, w, a, b, s: F.linear(x, w) + s * F.linear(s * F.linear(x, a), b),
        torch.tensor(2.0, requires_grad=True),
    ),
}


@pytest.mark.parametrize("kind", GAINS)
def test_a_scalar_tensor_scales_and_gets_its_gradient(kind: str) -> None:
    function, gain = GAINS[kind]
    assert_one_op(function, X, W, A, B, gain)


def test_a_scalar_tensor_scales_the_bias_of_b_as_well() -> None:
    def function(x: Tensor, w: Tensor, a: Tensor, b: Tensor, s: Tensor, bias: Tensor) -> Tensor:
        return F.linear(x, w) + F.linear(F.linear(x, a), b, bias) * s

    assert_one_op(function, X, W, A, B, torch.tensor(2.0, requires_grad=True), randn(24, seed=7))


def test_scalars_in_float16_are_not_multiplied() -> None:
    """Their product may underflow where the graph, which multiplies by each in float32, does not."""

    def function(x: Tensor, w: Tensor, a: Tensor, b: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return F.linear(x, w) + low(x, a, b) * s * t

    small = torch.tensor(1e-4, dtype=torch.float16)
    outcome = analyse(function, X, W, A, B, small, small.clone())
    assert all(float(gradient.norm()) > 0 for gradient in outcome.rewritten.tensors() if gradient is not None)
    outcome.assert_close(3e-6)


def test_adapters_on_one_weight_layout_are_still_grouped() -> None:
    def function(x: Tensor, w: Tensor, down: Tensor, up: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, w) + x @ down @ up, F.linear(x, w) + x @ other @ up

    outcome = analyse(function, X, W, DOWN, UP, randn(16, 4, seed=5))
    assert outcome.ops == ["lora_group"]
    outcome.assert_close(3e-6)


def kept_for_later(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(x, w)
    view = y[0]
    y += low(x, a, b)
    return y, view.exp()


def read_afterwards(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    y = F.linear(x, w)
    z = y.add_(low(x, a, b))
    return z, y.sin()


def written_to_an_input(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
    x = x.detach()
    base = w.sum() * x[..., :1].expand(2, 3, 24).contiguous()
    rows = base.view(6, 24)
    base += low(x, a, b)
    return base + rows.view(2, 3, 24)


@pytest.mark.parametrize("function", [kept_for_later, read_afterwards, written_to_an_input], ids=lambda f: f.__name__)
def test_a_sum_in_place_whose_old_value_is_seen_stays(function: Function) -> None:
    outcome = analyse(function, X, W, A, B)
    assert outcome.ops == []
    outcome.assert_close(0)


UNLIKE: dict[str, Function] = {
    "a vector scales": lambda x, w, a, b: F.linear(x, w) + low(x, a, b) * w[:, 0],
    "a computed number scales": lambda x, w, a, b: F.linear(x, w) + low(x, a, b) * x.sum(),
    "the bias of B is not scaled": lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a) * 2.0, b, BIAS),
    "the bias of B is not scaled with x": lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x * 2.0, a), b, BIAS),
    "divided the other way": lambda x, w, a, b: F.linear(x, w) + 2.0 / low(x, a, b),
    "a beta scales the sum": lambda x, w, a, b: torch.addmm(F.linear(x[0], w), F.linear(x[0], a), b.t(), beta=0.5),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_what_is_not_a_scaled_low_rank_product_stays(kind: str) -> None:
    outcome = analyse(UNLIKE[kind], X, W, A, B)
    assert outcome.ops == []
    assert outcome.misses
    outcome.assert_identical()


def test_changing_scalars_are_read_at_each_call() -> None:
    def function(x: Tensor, w: Tensor, a: Tensor, b: Tensor, s: Tensor) -> Tensor:
        return F.linear(x, w) + low(x, a, b) * s

    made = torch.compile(function, backend="fastlora")
    gain = torch.tensor(1.0)
    for value in (1.0, 3.0):
        gain.fill_(value)
        torch.testing.assert_close(made(X, W, A, B, gain), function(X, W, A, B, gain))


@pytest.mark.parametrize("order", ["x * (root * weight)", "(weight * x) * root", "weight * root * x"])
def test_a_norm_is_a_product_in_any_order(order: str) -> None:
    def function(x: Tensor, weight: Tensor) -> Tensor:
        root = torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        if order.startswith("x"):
            return x * (root * weight)
        return (weight * x) * root if order.startswith("(") else weight * root * x

    outcome = analyse(function, X, randn(16, seed=1), verify=True)
    assert outcome.ops == ["rms_norm"], outcome.missed()
    outcome.assert_close(3e-6)
    inputs = [t.detach().to(bf16).requires_grad_() for t in (X, randn(16, seed=1))]
    assert_as_exact(analyse(function, *inputs), function, inputs)


DIAGONALS: dict[str, tuple[Function, Tensor]] = {
    "behind": (lambda x, w: torch.einsum("bkk,rk->bkr", x, w), randn(2, 16, 16)),
    "in front": (lambda x, w: torch.einsum("kbk,rk->kbr", x, w), randn(16, 2, 16)),
}


@pytest.mark.parametrize("kind", DIAGONALS)
def test_an_einsum_of_a_diagonal_is_no_linear_layer(kind: str) -> None:
    function, x = DIAGONALS[kind]
    outcome = analyse(lambda x, w, a, b: function(x, w) + F.linear(function(x, a), b), x, W, A, B)
    outcome.assert_close(3e-6)


def test_a_copy_that_may_be_an_alias_keeps_the_write() -> None:
    def function(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        y = F.linear(x, w)
        z = y.sum_to_size(1, 24)
        y = y.add_(low(x, a, b))
        return y, z.sin()

    for rows in (6, 1):
        analyse(function, randn(rows, 16), W, A, B).assert_close(3e-6)


def test_merged_adapters_on_one_input_are_grouped() -> None:
    def function(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, w + b @ a), F.linear(x, w) + low(x, a, b)

    analyse(function, X, W, A, B).assert_close(3e-6)


def test_a_weight_that_broadcasts_keeps_its_sum() -> None:
    outcome = analyse(lambda x, w, a, b: F.linear(x, w[:1] * 1.0 + b @ a), X, W, A, B)
    outcome.assert_close(3e-6)
