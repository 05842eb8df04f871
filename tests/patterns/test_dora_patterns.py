"""Graphs of PEFT's DoRA are fused, look-alikes are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import Lookalike, analyse, assert_as_exact, bf16, f32, randn
from torch import Tensor


def layer(n: int = 24, k: int = 16, rank: int = 4, seed: int = 0, base: torch.dtype = f32) -> tuple[Tensor, ...]:
    weight = randn(n, k, seed=seed, grad=False, dtype=base, scale=0.3)
    magnitude = (1 + 0.3 * randn(n, seed=seed + 3).detach()).requires_grad_()
    return weight, randn(rank, k, seed=seed + 1, scale=0.3), randn(n, rank, seed=seed + 2, scale=0.3), magnitude


X = randn(2, 3, 16)
BIAS = randn(24, grad=False)


def norms(dtype: torch.dtype, w: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    unit = torch.eye(a.shape[1], device=a.device, dtype=a.dtype)
    product = F.linear(F.linear(unit, a), b).T.to(dtype)
    w = w.to(dtype)
    return torch.linalg.norm(w + scaling * product.detach(), dim=1).to(w.dtype).detach()


def dora(
    x: Tensor,
    w: Tensor,
    a: Tensor,
    b: Tensor,
    m: Tensor,
    bias: Tensor | None = None,
    scaling: float = 2.0,
    p: float = 0.0,
    base: Tensor | None = None,
) -> Tensor:
    result = F.linear(x, w, bias) if base is None else base
    dtype = result.dtype
    x = x.to(a.dtype)
    plain = result if bias is None else result - bias
    if p:
        x = F.dropout(x, p)
        plain = F.linear(x, w.to(x.dtype))
    scale = (m / norms(x.dtype, w, a, b, scaling)).view(1, -1)
    low = F.linear(F.linear(x, a), b)
    return (result + ((scale - 1) * plain + scale * low * scaling)).to(dtype)


@pytest.mark.parametrize("scaling", [1.0, 2.0])
@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "biased"])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_a_layer_and_its_norms_are_two_ops(dtype: torch.dtype, bias: Tensor | None, scaling: float) -> None:
    inputs = [X.detach().to(dtype).requires_grad_(), *layer(base=dtype), None if bias is None else bias.to(dtype)]
    function = lambda *given: dora(*given, scaling=scaling)  # noqa: E731
    outcome = analyse(function, *inputs, verify=True)
    assert outcome.ops == ["dora_linear", "dora_norm"]
    assert not outcome.misses
    assert "eye" not in outcome.targets()
    outcome.assert_tidy()
    outcome.assert_close(2e-6 if dtype == f32 else 2e-2)
    assert_as_exact(outcome, function, inputs)


@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "biased"])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_with_dropout_the_base_layer_runs_twice(dtype: torch.dtype, bias: Tensor | None) -> None:
    """Also on the dropped-out input, with eager's mask."""
    inputs = [X.detach().to(dtype).requires_grad_(), *layer(base=dtype), None if bias is None else bias.to(dtype)]
    outcome = analyse(lambda *given: dora(*given, p=0.4), *inputs, verify=True)
    assert outcome.ops == ["dora_add", "dora_norm"]
    assert not outcome.misses
    outcome.assert_close(2e-6 if dtype == f32 else 2e-2)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_a_layer_under_autocast_is_fused(p: float) -> None:
    def function(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=bf16):
            return dora(*given, p=p)

    outcome = analyse(function, X, *layer())
    assert outcome.ops == ["dora_add" if p else "dora_linear", "dora_norm"]
    outcome.assert_close(2e-2)


@pytest.mark.parametrize("trained", ["m", "x m", "a b m", "x w a b m", "x a b m bias"])
def test_any_subset_of_tensors_may_be_trained(trained: str) -> None:
    tensors = dict(zip(("x", "w", "a", "b", "m", "bias"), (X, *layer(), BIAS), strict=True))
    inputs = [t.detach().requires_grad_(name in trained.split()) for name, t in tensors.items()]
    outcome = analyse(dora, *inputs)
    assert outcome.ops == ["dora_linear", "dora_norm"]
    outcome.assert_close(2e-6)


def test_an_adapter_on_a_conv1d_is_fused() -> None:
    """The weight is transposed, also for the norm."""

    def function(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, m: Tensor, bias: Tensor) -> Tensor:
        base = torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.size(1))
        return dora(x, weight.T.detach(), a, b, m, bias, base=base)

    weight, a, b, m = layer()
    outcome = analyse(function, X, weight.t().contiguous(), a, b, m, BIAS)
    assert outcome.ops == ["dora_add", "dora_norm"]
    outcome.assert_close(2e-6)


def test_two_adapters_on_one_layer_are_both_fused() -> None:
    def function(x: Tensor, w: Tensor, *adapters: Tensor) -> Tensor:
        first = dora(x, w, *adapters[:3])
        return dora(x, w, *adapters[3:], base=first)

    outcome = analyse(function, X, *layer(), *layer(rank=3, seed=5)[1:])
    assert outcome.ops == ["dora_add", "dora_linear", "dora_norm", "dora_norm"]
    outcome.assert_tidy()
    outcome.assert_close(2e-6)


def test_dynamic_batch_and_length_are_supported() -> None:
    x = randn(2, 3, 16)
    for dimension in (0, 1):
        torch._dynamo.mark_dynamic(x, dimension)
    outcome = analyse(dora, x, *layer(), dynamic=None)
    assert outcome.ops == ["dora_linear", "dora_norm"]
    outcome.assert_close(2e-6)


def combined(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    base, low = F.linear(x, w, bias), F.linear(F.linear(x, a), b)
    return base + ((scale - 1) * base + scale * low * 2.0)


def less_two(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    base, low = F.linear(x, w), F.linear(F.linear(x, a), b)
    return base + ((scale - 2) * base + scale * low * 2.0)


def two_scales(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    base, low = F.linear(x, w), F.linear(F.linear(x, a), b)
    return base + ((scale - 1) * base + scale.exp() * low * 2.0)


def escaping(x: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: Tensor) -> Any:
    low = F.linear(F.linear(x, a), b)
    base = F.linear(x, w)
    return base + ((scale - 1) * base + scale * low * 2.0), low


def norm(w: Tensor, a: Tensor, b: Tensor, how: Any, unit: Any = torch.eye) -> Tensor:
    product = F.linear(F.linear(unit(16), a), b).T
    return how(w, product)


def _over(dim: int, **options: Any) -> Any:
    return lambda w, product: torch.linalg.norm(w + 2.0 * product.detach(), dim=dim, **options).detach()


W, A, B, M = layer()
SCALE = (1 + 0.3 * randn(1, 24).detach()).requires_grad_()
LOOKALIKES = [
    Lookalike("another number than one", less_two, (X, W, A, B, SCALE)),
    Lookalike("two scales", two_scales, (X, W, A, B, SCALE)),
    Lookalike("the low-rank product is also an output", escaping, (X, W, A, B, SCALE), missed="leaves the graph"),
    Lookalike("a scale for each token", combined, (X, W, A, B, randn(2, 3, 1)), missed="the scale has the shape"),
    Lookalike("a scale for each element", combined, (X, W, A, B, randn(2, 3, 24)), missed="the scale has the shape"),
    Lookalike("one scale for all", combined, (X, W, A, B, randn(1)), missed="the scale has the shape"),
    Lookalike("norms of columns", lambda w, a, b: norm(w, a, b, _over(0)), (W, A, B)),
    Lookalike("another norm", lambda w, a, b: norm(w, a, b, _over(1, ord=1)), (W, A, B)),
    Lookalike("norms that keep a dimension", lambda w, a, b: norm(w, a, b, _over(1, keepdim=True)), (W, A, B)),
    Lookalike("no unit matrix", lambda w, a, b: norm(w, a, b, _over(1), torch.ones_like(W[:16, :16]).tril), (W, A, B)),
    Lookalike(
        "norms with gradients",
        lambda w, a, b: norm(w, a, b, lambda w, product: torch.linalg.norm(w + 2.0 * product, dim=1)),
        (W, A, B),
    ),
    Lookalike(
        "a product with gradients",
        lambda w, a, b: norm(w, a, b, lambda w, product: torch.linalg.norm(w + 2.0 * product.detach(), dim=1)),
        (W.detach().requires_grad_(), A, B),
    ),
]


@pytest.mark.parametrize("case", LOOKALIKES, ids=str)
def test_lookalikes_are_not_fused(case: Lookalike) -> None:
    case.check()


def test_a_scaled_bias_is_fused_as_dora_add() -> None:
    """`dora_linear` does not scale the bias."""
    outcome = analyse(combined, X, W, A, B, SCALE, BIAS)
    assert outcome.ops == ["dora_add"]
    assert "the bias is scaled as well" in outcome.turned_down()
    outcome.assert_close(2e-6)
