"""Rotary embeddings as models write them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import Function, analyse, assert_as_exact, bf16, f32, randn, rotary, rotate_half
from torch import Tensor


def halves_by_chunk(x, cos, sin):
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def halves_by_split(x, cos, sin):
    first, second = torch.split(x, x.shape[-1] // 2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def sine_first(x, cos, sin):
    return torch.add(sin * rotate_half(x), cos * x)


def flipped(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], -x[..., :half]), dim=-1) * sin


def pairs(x, cos, sin):
    even, odd = x[..., 0::2], x[..., 1::2]
    return x * cos + torch.stack((-odd, even), dim=-1).flatten(-2) * sin


def pairs_in_float(x, cos, sin):
    h = x.float()
    even, odd = h[..., ::2], h[..., 1::2]
    return (h * cos.float() + torch.stack([-odd, even], dim=-1).flatten(-2) * sin.float()).to(x.dtype)


def in_float(x, cos, sin):
    h = x.float()
    return (h * cos.float() + rotate_half(h) * sin.float()).to(x.dtype)


def turned_before_the_cast(x, cos, sin):
    return (x.float() * cos + rotate_half(x).float() * sin).to(x.dtype)


SPELLINGS: list[tuple[Function, str]] = [
    (rotary, "half"),
    (halves_by_chunk, "half"),
    (halves_by_split, "half"),
    (sine_first, "half"),
    (flipped, "flipped"),
    (pairs, "pairs"),
    (pairs_in_float, "pairs"),
    (in_float, "half"),
    (turned_before_the_cast, "half"),
]


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize(("function", "layout"), SPELLINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_spelling_of_a_rotary_embedding_is_one_op(function: Function, layout: str, dtype: torch.dtype) -> None:
    inputs = [randn(2, 4, 3, 8, dtype=dtype), *(randn(2, 1, 3, 8, seed=s, grad=False, dtype=dtype) for s in (1, 2))]
    outcome = analyse(function, *inputs)
    assert outcome.ops == ["rotary"]
    assert not outcome.misses
    assert outcome.chosen[0].arguments["layout"] == layout
    outcome.assert_tidy()
    assert_as_exact(outcome, function, inputs)
    if dtype == f32:
        outcome.assert_close()


@pytest.mark.parametrize(("function", "layout"), SPELLINGS[:6], ids=lambda value: getattr(value, "__name__", ""))
def test_a_rotary_embedding_of_a_part_of_each_head_is_one_op(function: Function, layout: str) -> None:
    def partial(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return torch.cat((function(x[..., :8], cos, sin), x[..., 8:]), dim=-1)

    inputs = [randn(2, 4, 3, 12), *(randn(3, 8, seed=s, grad=False) for s in (1, 2))]
    outcome = analyse(partial, *inputs)
    assert outcome.ops == ["rotary"]
    assert not outcome.misses
    arguments = outcome.chosen[0].arguments
    assert (arguments["layout"], arguments["rotary_dim"]) == (layout, 8)
    outcome.assert_close()


def test_query_and_key_with_transposed_heads_are_both_claimed() -> None:
    def attention(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        q, k = q.view(2, 3, 4, 8).transpose(1, 2), k.view(2, 3, 4, 8).transpose(1, 2)
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return rotary(q, cos, sin), rotary(k, cos, sin)

    tables = [randn(2, 3, 8, seed=s, grad=False) for s in (1, 2)]
    outcome = analyse(attention, randn(2, 3, 32), randn(2, 3, 32, seed=3), *tables)
    assert outcome.ops == ["rotary", "rotary"]
    outcome.assert_close()


def test_learned_tables_get_their_gradients() -> None:
    outcome = analyse(rotary, randn(2, 4, 3, 8), randn(2, 1, 3, 8, seed=1), randn(3, 8, seed=2))
    assert outcome.ops == ["rotary"]
    outcome.assert_close()


def test_a_rotary_embedding_of_any_length_is_claimed() -> None:
    inputs = [randn(2, 4, 3, 8), *(randn(3, 8, seed=s, grad=False) for s in (1, 2))]
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, tensor.dim() - 2)
    outcome = analyse(rotary, *inputs, dynamic=None)
    assert outcome.ops == ["rotary"]
    outcome.assert_close()
