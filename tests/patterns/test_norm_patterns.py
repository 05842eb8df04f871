"""Graphs of RMSNorm and LayerNorm as in models are fused with the right arguments, and equal eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import Function, analyse, assert_as_exact, bf16, f32, randn
from torch import Tensor

SHAPE = (2, 3, 16)
EPS = 1e-6


def root(h: Tensor) -> Tensor:
    return torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)


def llama(x, w):
    h = x.to(torch.float32)
    return w * (h * root(h)).to(x.dtype)


def gemma(x, w):
    h = x.float()
    return (h * root(h) * (1.0 + w.float())).type_as(x)


def gpt_oss(x, w):
    h = x.float()
    return (w * (h * root(h))).to(x.dtype)


def nanochat(x, w):
    return F.rms_norm(x, (x.size(-1),), eps=EPS)


def weightless(x, w):
    h = x.float()
    return (h * root(h)).to(x.dtype)


def t5(x, w):
    h = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)
    return w * h.to(x.dtype)


def division(x, w):
    h = x.float()
    return w * (h / torch.sqrt(h.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def inverse_root(x, w):
    h = x.float()
    return w * (h * (1.0 / torch.sqrt((h * h).mean(-1, keepdim=True) + EPS))).to(x.dtype)


def power(x, w):
    h = x.float()
    return w * (h * torch.pow(h.pow(2).mean(-1, keepdim=True) + EPS, -0.5)).to(x.dtype)


def builtin(x, w):
    return F.rms_norm(x, (16,), w.to(x.dtype), EPS)


def builtin_method(x, w):
    return torch.rms_norm(x, (16,), w.to(x.dtype), EPS)


SPELLINGS: list[tuple[Function, float, bool]] = [
    (llama, 0.0, True),
    (gemma, 1.0, True),
    (gpt_oss, 0.0, True),
    (nanochat, 0.0, False),
    (weightless, 0.0, False),
    (t5, 0.0, True),
    (division, 0.0, True),
    (inverse_root, 0.0, True),
    (power, 0.0, True),
    (builtin, 0.0, True),
    (builtin_method, 0.0, True),
]


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize(("function", "offset", "weighted"), SPELLINGS, ids=lambda v: getattr(v, "__name__", ""))
def test_every_spelling_of_rms_norm_is_one_op(
    function: Function, offset: float, weighted: bool, dtype: torch.dtype
) -> None:
    inputs = [randn(*SHAPE, dtype=dtype), randn(16, dtype=f32)]
    outcome = analyse(function, *inputs)
    assert outcome.ops == ["rms_norm"]
    assert not outcome.misses
    (match,) = outcome.chosen
    assert (match.arguments["offset"], match.arguments["weight"] is not None) == (offset, weighted)
    outcome.assert_tidy()
    assert_as_exact(outcome, function, inputs)
    if dtype == f32:
        outcome.assert_close()


def test_the_rounding_order_is_an_argument_of_the_op() -> None:
    inputs = [randn(*SHAPE, dtype=bf16), randn(16, dtype=bf16)]
    early, late = (analyse(function, *inputs).chosen[0].arguments["norm_dtype"] for function in (llama, gpt_oss))
    assert (early, late) == (bf16, f32)


@pytest.mark.parametrize("dtype", [f32, bf16, torch.float16], ids=str)
def test_torch_rms_norm_has_its_default_eps(dtype: torch.dtype) -> None:
    """On values so small that eps dominates."""
    inputs = [randn(*SHAPE, dtype=dtype, scale=1e-3)]
    function = lambda x: F.rms_norm(x, (16,))  # noqa: E731
    outcome = analyse(function, *inputs)
    assert outcome.ops == ["rms_norm"]
    outcome.assert_close(1e-6 if dtype == f32 else 2e-2)


def test_norms_of_query_and_key_heads_are_fused() -> None:
    def function(q: Tensor, k: Tensor, wq: Tensor, wk: Tensor) -> tuple[Tensor, Tensor]:
        q, k = q.view(2, 3, 4, 4), k.view(2, 3, 4, 4)
        return llama(q, wq).transpose(1, 2), llama(k.transpose(1, 2), wk)

    outcome = analyse(function, randn(*SHAPE), randn(*SHAPE, seed=1), randn(4), randn(4, seed=1))
    assert outcome.ops == ["rms_norm", "rms_norm"]
    outcome.assert_close()


@pytest.mark.parametrize("function", [llama, gemma, weightless, builtin], ids=lambda f: f.__name__)
@pytest.mark.parametrize("keeps_sum", [True, False], ids=["sum is used", "sum is not used"])
def test_the_norm_of_a_residual_sum_is_fused_with_it(function: Function, keeps_sum: bool) -> None:
    def block(x: Tensor, y: Tensor, w: Tensor) -> Any:
        total = x + y
        return (function(total, w), total) if keeps_sum else function(total, w)

    outcome = analyse(block, randn(*SHAPE), randn(*SHAPE, seed=1), randn(16))
    assert outcome.ops == ["add_rms_norm"]
    outcome.assert_tidy()
    outcome.assert_close()


def test_two_norms_of_one_sum_are_fused_separately() -> None:
    def function(x: Tensor, y: Tensor, w: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        return llama(total, w), llama(total, v)

    outcome = analyse(function, randn(*SHAPE), randn(*SHAPE, seed=1), randn(16), randn(16, seed=1))
    assert len(outcome.ops) == 2
    outcome.assert_tidy()
    outcome.assert_close()


def test_a_value_added_to_itself_gets_both_gradients() -> None:
    outcome = analyse(lambda x, w: llama(x + x, w), randn(*SHAPE), randn(16))
    assert outcome.ops == ["add_rms_norm"]
    outcome.assert_close()


def test_every_norm_of_a_chain_of_blocks_is_fused() -> None:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        for w in weights:
            x = x + torch.sin(llama(x, w))
        return llama(x, weights[0])

    outcome = analyse(function, randn(*SHAPE), randn(16), randn(16, seed=1), randn(16, seed=2))
    assert outcome.ops == ["add_rms_norm"] * 3 + ["rms_norm"]
    outcome.assert_tidy()
    outcome.assert_close(2e-6)


LAYER_NORMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "functional": lambda x, w, b: F.layer_norm(x, (16,), w, b, 1e-5),
    "keywords": lambda x, w, b: F.layer_norm(x, normalized_shape=(16,), weight=w, bias=b, eps=1e-5),
    "default eps": lambda x, w, b: F.layer_norm(x, (16,), w, b),
    "torch": lambda x, w, b: torch.layer_norm(x, (16,), w, b, 1e-5),
    "without bias": lambda x, w, b: F.layer_norm(x, (16,), w, None, 1e-5),
    "bare": lambda x, w, b: F.layer_norm(x, (16,), eps=1e-5),
    "written with a mean of squares": lambda x, w, b: (
        (x - x.mean(-1, keepdim=True))
        * torch.rsqrt((x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + 1e-5)
        * w
    ),
    "written with a division": lambda x, w, b: (
        w * ((x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5))
    ),
    "written with a variance": lambda x, w, b: (
        w * ((x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5))
    ),
}


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_every_spelling_of_layer_norm_is_one_op(name: str) -> None:
    outcome = analyse(LAYER_NORMS[name], randn(*SHAPE), randn(16), randn(16, seed=1))
    assert outcome.ops == ["layer_norm"]
    assert not outcome.misses
    outcome.assert_close(2e-6)


def test_an_nn_layer_norm_is_fused() -> None:
    norm = torch.nn.LayerNorm(16)
    outcome = analyse(lambda x: norm(x), randn(*SHAPE))
    assert outcome.ops == ["layer_norm"]
    outcome.assert_close()


@pytest.mark.parametrize("dynamic", [False, True], ids=["of one size", "of any size"])
@pytest.mark.parametrize("added", [False, True], ids=["alone", "with a residual"])
def test_layer_norm_of_a_transposed_convolution_output_is_fused(added: bool, dynamic: bool) -> None:
    """As in vision models, whose residual stream keeps these strides; the output of torch's own norm is contiguous."""

    def function(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        patches = F.avg_pool2d(x, (3, 1)).flatten(2).transpose(1, 2)
        total = patches + y if added else patches
        return F.layer_norm(total, (16,), w, b, 1e-5), total

    inputs = randn(2, 16, 9, 4), randn(2, 12, 16), randn(16), randn(16, seed=1)
    outcome = analyse(function, *inputs, dynamic=dynamic)
    assert outcome.ops == ["add_layer_norm" if added else "layer_norm"]
    assert not outcome.misses
    outcome.assert_close(2e-6)


def test_layer_norm_of_a_residual_sum_is_fused_with_it() -> None:
    def function(x: Tensor, y: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        total = F.dropout(x, 0.5) + y
        return F.layer_norm(total, (16,), w, b, 1e-5), total

    outcome = analyse(function, randn(*SHAPE), randn(*SHAPE, seed=1), randn(16), randn(16, seed=1))
    assert outcome.ops == ["add_layer_norm"]
    outcome.assert_close(2e-6)


@pytest.mark.parametrize("norm", [llama, lambda x, w: F.layer_norm(x, (16,), w, None, 1e-5)], ids=["rms", "layer"])
def test_the_weight_of_an_unused_norm_gets_no_gradient(norm: Function) -> None:
    """None, not zeros: with a gradient of zeros, an optimizer would still apply weight decay."""

    def function(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        return norm(total, w).detach(), total

    outcome = analyse(function, randn(*SHAPE), randn(*SHAPE, seed=1), randn(16))
    assert outcome.rewritten.gradients[2] is None
    outcome.assert_close()


@pytest.mark.parametrize("trained", ["x", "weight"])
def test_any_subset_of_tensors_may_be_trained(trained: str) -> None:
    x, w = randn(*SHAPE, grad=trained == "x"), randn(16, grad=trained == "weight")
    outcome = analyse(llama, x, w)
    assert outcome.ops == ["rms_norm"]
    outcome.assert_close()


def test_a_dynamic_length_is_supported() -> None:
    outcome = analyse(llama, randn(*SHAPE), randn(16), dynamic=True)
    assert outcome.ops == ["rms_norm"]
    outcome.assert_close()
