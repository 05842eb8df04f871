"""Graphs of PEFT's adapters, on all kinds of base layers, are fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import analyse, assert_as_exact, bf16, f32, lora, randn
from torch import Tensor


def layer(n: int, k: int, rank: int = 4, seed: int = 0, base: torch.dtype = f32) -> tuple[Tensor, Tensor, Tensor]:
    weight = randn(n, k, seed=seed, grad=False, dtype=base, scale=0.3)
    return weight, randn(rank, k, seed=seed + 1, scale=0.3), randn(n, rank, seed=seed + 2, scale=0.3)


X = randn(2, 3, 16)
BF16 = X.detach().to(bf16).requires_grad_()
BIAS = randn(24, grad=False)


def biased(x, w, a, b, bias, lora_bias=None):
    return F.linear(x, w, bias) + F.linear(F.linear(x, a), b, lora_bias) * 2.0


def unscaled(x, w, a, b):
    return F.linear(x, w) + F.linear(F.linear(x, a), b)


def scaled_first(x, w, a, b):
    return 0.5 * F.linear(F.linear(x, a), b) + F.linear(x, w)


def by_matrices(x, w, a, b):
    return x @ w.T + torch.matmul(x @ a.t(), b.transpose(0, 1)) * 2.0


@pytest.mark.parametrize("function", [unscaled, scaled_first, by_matrices, lora], ids=lambda f: f.__name__)
def test_every_spelling_of_a_lora_layer_is_one_op(function: Any) -> None:
    outcome = analyse(function, X, *layer(24, 16))
    assert outcome.ops == ["lora_linear"]
    assert not outcome.misses
    outcome.assert_tidy()
    outcome.assert_close(2e-6)


@pytest.mark.parametrize("has_lora_bias", [True, False], ids=["biased B", "plain B"])
def test_biases_of_base_and_adapter_are_arguments(has_lora_bias: bool) -> None:
    more = [randn(24, seed=1)] if has_lora_bias else []
    outcome = analyse(biased, X, *layer(24, 16), BIAS.detach().requires_grad_(), *more)
    assert outcome.ops == ["lora_linear"]
    assert (outcome.chosen[0].arguments["lora_bias"] is not None) is has_lora_bias
    outcome.assert_close(2e-6)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_float32_adapters_on_any_base_dtype_are_fused(dtype: torch.dtype, p: float) -> None:
    """Dropout draws eager's random numbers, so gradients agree."""
    inputs = [X if dtype == f32 else BF16, *layer(24, 16, base=dtype)]
    function = lambda *given: lora(*given, p=p)  # noqa: E731
    outcome = analyse(function, *inputs)
    assert outcome.ops == ["lora_linear"]
    assert (outcome.chosen[0].arguments.get("x_dropped") is not None) is (p > 0)
    outcome.assert_tidy()
    outcome.assert_close(2e-6 if dtype == f32 else 2e-2)
    if not p:
        assert_as_exact(outcome, function, inputs)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_an_adapter_under_autocast_is_fused(p: float) -> None:
    def function(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=bf16):
            return lora(*given, p=p)

    outcome = analyse(function, X, *layer(24, 16))
    assert outcome.ops == ["lora_linear"]
    outcome.assert_close(2e-2)


def in_a_wide_stream(x, w, a, b):
    return F.linear(x.to(bf16), w).to(f32) + F.linear(F.linear(x, a), b) * 2.0


def rounded_before(x, w, a, b):
    with torch.autocast("cpu", dtype=bf16):
        return F.linear(x.half(), w) + F.linear(F.linear(x, a), b) * 2.0


@pytest.mark.parametrize("autocast", [False, True])
def test_a_base_that_is_cast_to_a_float32_residual_stream_is_fused(autocast: bool) -> None:
    """As over base layers that PEFT has cast to float32, except for their products."""

    def function(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=bf16, enabled=autocast):
            return in_a_wide_stream(*given)

    outcome = analyse(function, X, *layer(24, 16, base=bf16))
    assert outcome.ops == ["lora_linear"]
    found = outcome.chosen[0].arguments
    assert (found["base_dtype"], found["lora_dtype"], found["out_dtype"]) == (bf16, bf16 if autocast else f32, f32)
    outcome.assert_tidy()
    outcome.assert_close(2e-6)


def test_a_base_that_rounds_its_input_differently_stays() -> None:
    outcome = analyse(rounded_before, X, *layer(24, 16))
    assert "lora_linear" not in outcome.ops


@pytest.mark.parametrize("trained", ["x", "a", "b", "w", "x a", "a b", "x b", "x w a b"])
def test_any_subset_of_tensors_may_be_trained(trained: str) -> None:
    tensors = dict(zip("xwab", (X, *layer(24, 16)), strict=True))
    inputs = [t.detach().requires_grad_(name in trained.split()) for name, t in tensors.items()]
    outcome = analyse(lora, *inputs)
    assert outcome.ops == ["lora_linear"]
    outcome.assert_close(2e-6)


def test_two_adapters_on_one_layer_are_both_fused() -> None:
    def function(x: Tensor, w: Tensor, a: Tensor, b: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        result = F.linear(x, w)
        result = result + F.linear(F.linear(F.dropout(x, 0.3), a), b) * 2.0
        result = result + F.linear(F.linear(x, a2), b2) * 3.0
        return result.to(x.dtype)

    outcome = analyse(function, X, *layer(24, 16), *layer(24, 16, 3, seed=5)[1:])
    assert outcome.ops == ["lora_add", "lora_linear"]
    outcome.assert_tidy()
    outcome.assert_close(2e-6)


class QuantizedProduct(torch.autograd.Function):
    """A fake of a 4-bit layer: the weight is computed inside, and only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor) -> Tensor:
        ctx.save_for_backward(packed)
        return F.linear(x, packed.to(x.dtype) / 16)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        (packed,) = ctx.saved_tensors
        return grad @ (packed.to(grad.dtype) / 16), None


def on_a_function(x, packed, a, b):
    return QuantizedProduct.apply(x, packed) + F.linear(F.linear(x, a), b) * 2.0


def on_addmm(x, weight, a, b, bias):
    """A Conv1D of GPT-2, whose weight is transposed."""
    base = torch.addmm(bias, x.view(-1, x.size(-1)), weight).view(*x.shape[:-1], weight.size(1))
    return base + F.linear(F.linear(x, a), b) * 2.0


def test_an_adapter_on_an_autograd_function_keeps_its_gradient() -> None:
    packed = torch.arange(384).remainder(17).sub(8).view(24, 16).to(torch.int8)
    outcome = analyse(on_a_function, X, packed, *layer(24, 16)[1:])
    assert outcome.ops == ["lora_add"]
    outcome.assert_close(2e-6)


@pytest.mark.parametrize("rounded", ["before it is scaled", "before it is added", "never"])
def test_the_adapters_output_may_be_rounded_before_the_addition(rounded: str) -> None:
    """As in PEFT for AWQ layers, for other quantized layers, and for plain ones."""

    def function(x: Tensor, packed: Tensor, a: Tensor, b: Tensor) -> Tensor:
        half = bf16 if x.dtype == f32 else x.dtype
        base = QuantizedProduct.apply(x, packed).to(half)
        low = F.linear(F.linear(x.to(a.dtype), a), b)
        if rounded == "before it is scaled":
            return base + low.to(half) * 3.0
        return base + (low * 3.0).to(half) if rounded == "before it is added" else (base + low * 3.0).to(half)

    packed = torch.arange(384).remainder(17).sub(8).view(24, 16).to(torch.int8)
    inputs = [X, packed, *layer(24, 16)[1:]]
    outcome = analyse(function, *inputs)
    assert outcome.ops == ["lora_add"]
    outcome.assert_tidy()
    outcome.assert_close(2e-2)
    assert_as_exact(outcome, function, inputs)


def test_an_adapter_on_a_conv1d_is_fused() -> None:
    weight, a, b = layer(24, 16)
    outcome = analyse(on_addmm, X, weight.t().contiguous(), a, b, BIAS)
    assert outcome.ops == ["lora_add"]
    outcome.assert_close(2e-6)


def attention_inputs(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return tuple(lora(x, *weights[i : i + 3]) for i in range(0, len(weights), 3))


QKV = (*layer(24, 16), *layer(8, 16, 3, seed=3), *layer(8, 16, 2, seed=6))


def test_projections_of_one_input_are_one_group() -> None:
    """With different widths and ranks, as in grouped-query attention."""
    outcome = analyse(attention_inputs, X, *QKV)
    assert outcome.ops == ["lora_group"]
    outcome.assert_tidy()
    outcome.assert_close(2e-6)


@pytest.mark.parametrize("unused", [0, 1, 2])
def test_parameters_of_an_unused_group_member_get_no_gradient(unused: int) -> None:
    def function(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        results = attention_inputs(x, *weights)
        return tuple(r.detach() if i == unused else r for i, r in enumerate(results))

    outcome = analyse(function, X, *QKV)
    assert outcome.ops == ["lora_group"]
    outcome.assert_close(2e-6)


def test_projections_with_dropout_keep_their_own_masks() -> None:
    def function(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        return lora(x, *weights[:3], p=0.5), lora(x, *weights[3:6], p=0.5)

    outcome = analyse(function, X, *QKV[:6])
    assert outcome.ops == ["lora_linear", "lora_linear"]
    outcome.assert_close(2e-6)


def test_projections_of_different_inputs_are_not_grouped() -> None:
    outcome = analyse(lambda x, y, *w: (lora(x, *w[:3]), lora(y, *w[3:6])), X, randn(2, 3, 16, seed=1), *QKV[:6])
    assert outcome.ops == ["lora_linear", "lora_linear"]
    outcome.assert_close(2e-6)


def test_consecutive_projections_are_not_grouped() -> None:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        y = lora(x, *weights[:3])
        return y + lora(lora(y, *weights[3:6]), *weights[6:])

    layers = (*layer(16, 16), *layer(8, 16, 3, seed=3), *layer(16, 8, 2, seed=6))
    outcome = analyse(function, X, *layers)
    assert outcome.ops == ["lora_linear"] * 3
    outcome.assert_close(2e-6)


def test_one_adapter_shared_by_two_layers_gets_both_gradients() -> None:
    def function(x: Tensor, w: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return lora(x, w, a, b), lora(x, v, a, b)

    weight, a, b = layer(24, 16)
    outcome = analyse(function, X, weight, layer(24, 16, seed=7)[0], a, b)
    assert outcome.ops == ["lora_group"]
    outcome.assert_close(2e-6)


@pytest.mark.parametrize("dimensions", [(0,), (1,), (0, 1)], ids=str)
def test_dynamic_batch_and_length_are_supported(dimensions: Sequence[int]) -> None:
    x = randn(2, 3, 16)
    for dimension in dimensions:
        torch._dynamo.mark_dynamic(x, dimension)
    outcome = analyse(lora, x, *layer(24, 16), dynamic=None)
    assert outcome.ops == ["lora_linear"]
    outcome.assert_close(2e-6)


def test_two_dimensional_input_is_supported() -> None:
    outcome = analyse(lambda x, *w: lora(x * 1.5, *w), randn(6, 16), *layer(24, 16))
    assert outcome.ops == ["lora_linear"]
    outcome.assert_close(2e-6)
