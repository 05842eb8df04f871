"""Graphs of rotary embeddings as in models are fused, those of q and k to one op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from graphs import Function, analyse, assert_as_exact, bf16, f32, randn, rotary, rotate_half
from tiny_models import batch, build, step
from torch import Tensor

import fastlora


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


def pairs_by_shape(x, cos, sin):
    return x * cos + torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).reshape_as(x) * sin


def pairs_by_view(x, cos, sin):
    return x * cos + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).view(x.shape) * sin


def pairs_in_float(x, cos, sin):
    h = x.float()
    even, odd = h[..., ::2], h[..., 1::2]
    return (h * cos.float() + torch.stack([-odd, even], dim=-1).flatten(-2) * sin.float()).to(x.dtype)


def in_float(x, cos, sin):
    h = x.float()
    return (h * cos.float() + rotate_half(h) * sin.float()).to(x.dtype)


def rotated_before_the_cast(x, cos, sin):
    return (x.float() * cos + rotate_half(x).float() * sin).to(x.dtype)


SPELLINGS: list[tuple[Function, str]] = [
    (rotary, "half"),
    (halves_by_chunk, "half"),
    (halves_by_split, "half"),
    (sine_first, "half"),
    (flipped, "flipped"),
    (pairs, "pairs"),
    (pairs_by_shape, "pairs"),
    (pairs_by_view, "pairs"),
    (pairs_in_float, "pairs"),
    (in_float, "half"),
    (rotated_before_the_cast, "half"),
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


SECTIONS = [1, 1, 2]


def multimodal(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The tables have a row per axis, and each section of a head uses one of them."""
    cos, sin = (
        torch.cat([part[i % 3] for i, part in enumerate(table.split(SECTIONS * 2, dim=-1))], dim=-1).unsqueeze(1)
        for table in (cos, sin)
    )
    return x * cos + rotate_half(x) * sin


def test_sections_with_different_positions_are_one_op() -> None:
    tables = [randn(3, 2, 3, 8, seed=s, grad=False) for s in (1, 2)]
    outcome = analyse(multimodal, randn(2, 4, 3, 8), *tables)
    assert outcome.ops == ["rotary"]
    assert not outcome.misses
    outcome.assert_close()


def test_positions_are_looked_up_by_index() -> None:
    def indexed(x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
        return rotary(x, cos[position_ids].unsqueeze(1), sin[position_ids].unsqueeze(1))

    tables = [randn(20, 8, seed=s, grad=False) for s in (1, 2)]
    outcome = analyse(indexed, randn(2, 4, 3, 8), *tables, torch.tensor([[3, 7, 19], [0, 0, 1]]))
    assert outcome.ops == ["rotary"]
    assert not outcome.misses
    outcome.assert_close()


def transposed(x: Tensor, heads: int) -> Tensor:
    return x.view(2, 3, heads, 8).transpose(1, 2)


TABLES = [randn(2, 3, 8, seed=s, grad=False) for s in (1, 2)]
QUERY, KEY = randn(2, 3, 32), randn(2, 3, 16, seed=3)


SHARING = [rotary, halves_by_chunk, halves_by_split, flipped, pairs]
"""The spellings that use cos and sin directly, so that q and k share them, and whose result has the strides of x."""


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize("function", SHARING, ids=lambda function: function.__name__)
def test_query_and_key_become_one_op(function: Function, dtype: torch.dtype) -> None:
    """Their numbers of heads may differ, and heads stay transposed."""

    def attention(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        return function(transposed(q, 4), cos, sin), function(transposed(k, 2), cos, sin)

    inputs = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (QUERY, KEY, *TABLES)]
    outcome = analyse(attention, *inputs)
    assert outcome.ops == ["rotary_group"]
    assert not outcome.misses
    assert outcome.chosen[0].arguments["layout"] == dict(SPELLINGS)[function]
    outcome.assert_tidy()
    assert_as_exact(outcome, attention, inputs)


def test_partial_embeddings_of_query_and_key_are_grouped() -> None:
    def attention(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        cos, sin = cos.unsqueeze(1)[..., :4], sin.unsqueeze(1)[..., :4]
        return [
            torch.cat((rotary(x[..., :4], cos, sin), x[..., 4:]), dim=-1) for x in (transposed(q, 4), transposed(k, 2))
        ]

    outcome = analyse(attention, QUERY, KEY, *TABLES)
    assert outcome.ops == ["rotary_group"]
    assert outcome.chosen[0].arguments["rotary_dim"] == 4
    assert len(outcome.chosen[0].arguments["x"]) == 2
    outcome.assert_tidy()
    outcome.assert_close()


def test_query_and_key_are_grouped_layer_by_layer() -> None:
    def layers(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        for _ in range(3):
            q, k = rotary(transposed(x, 4), cos, sin), rotary(transposed(x * 2, 4), cos, sin)
            x = x + (q * torch.tanh(k)).transpose(1, 2).flatten(2)
        return x

    outcome = analyse(layers, QUERY, *TABLES)
    assert outcome.ops == ["rotary_group"] * 3
    assert not outcome.misses
    outcome.assert_close()


def test_a_key_that_depends_on_the_query_is_not_grouped() -> None:
    def chain(q: Tensor, cos: Tensor, sin: Tensor) -> Any:
        turned = rotary(q, cos, sin)
        return turned, rotary(torch.tanh(turned), cos, sin)

    outcome = analyse(chain, randn(2, 4, 3, 8), *(randn(3, 8, seed=s, grad=False) for s in (1, 2)))
    assert outcome.ops == ["rotary", "rotary"]
    outcome.assert_close()


def test_embeddings_with_other_angles_are_not_grouped() -> None:
    def attention(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return rotary(q, cos, sin), rotary(k, sin, cos)

    outcome = analyse(attention, *(randn(2, 4, 3, 8, seed=s) for s in (0, 3)), *(randn(3, 8, grad=False) for _ in "cs"))
    assert outcome.ops == ["rotary", "rotary"]
    outcome.assert_close()


def test_a_key_without_gradients_is_not_grouped() -> None:
    """In a group, its output would require one."""

    def attention(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return rotary(q, cos, sin), rotary(k, cos, sin)

    tables = [randn(3, 8, seed=s, grad=False) for s in (1, 2)]
    outcome = analyse(attention, randn(2, 4, 3, 8), randn(2, 4, 3, 8, seed=3, grad=False), *tables)
    assert outcome.ops == ["rotary", "rotary"]
    outcome.assert_close()


def test_learned_angles_are_not_grouped() -> None:
    """A group would have to copy q and k to save them."""

    def attention(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return rotary(q, cos, sin), rotary(k, cos, sin)

    outcome = analyse(attention, *(randn(2, 4, 3, 8, seed=s) for s in (0, 3)), *(randn(3, 8, seed=s) for s in (1, 2)))
    assert outcome.ops == ["rotary", "rotary"]
    outcome.assert_close()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma", "gemma3", "phi3", "gpt_neox"])
def test_query_and_key_of_every_layer_of_a_model_are_one_op(family: str) -> None:
    model = fastlora.compile(build(family))
    step(model, batch())
    report = fastlora.report(model)
    assert [op for site in report.fused for op in [site.op] * site.count if "rotary" in op] == ["rotary_group"] * 3
    coverage = report.coverage["rotary"]
    assert coverage.seen == coverage.fused > 0


def test_learned_tables_get_their_gradients() -> None:
    outcome = analyse(rotary, randn(2, 4, 3, 8), randn(2, 1, 3, 8, seed=1), randn(3, 8, seed=2))
    assert outcome.ops == ["rotary"]
    outcome.assert_close()


def test_a_dynamic_length_is_supported() -> None:
    inputs = [randn(2, 4, 3, 8), *(randn(3, 8, seed=s, grad=False) for s in (1, 2))]
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, tensor.dim() - 2)
    outcome = analyse(rotary, *inputs, dynamic=None)
    assert outcome.ops == ["rotary"]
    outcome.assert_close()


def turn_by_complex_numbers(x: Tensor, turns: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns).flatten(-2).type_as(x)


TURNS = torch.polar(torch.ones(5, 8), torch.linspace(0, 3, 40).view(5, 8))[None, :, None]


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_complex_numbers_rotate_pairs(dtype: torch.dtype) -> None:
    x = randn(2, 5, 4, 16, dtype=dtype)
    outcome = analyse(turn_by_complex_numbers, x, TURNS, verify=True)
    assert outcome.ops == ["rotary"], outcome.missed()
    assert not outcome.misses
    assert_as_exact(outcome, turn_by_complex_numbers, (x, TURNS))


def test_complex_query_and_key_are_one_op() -> None:
    def function(q: Tensor, k: Tensor, turns: Tensor) -> tuple[Tensor, Tensor]:
        return turn_by_complex_numbers(q, turns), turn_by_complex_numbers(k, turns)

    q, k = randn(2, 5, 4, 16, dtype=bf16), randn(2, 5, 2, 16, dtype=bf16, seed=1)
    outcome = analyse(function, q, k, TURNS, verify=True)
    assert outcome.ops == ["rotary_group"]
    assert_as_exact(outcome, function, (q, k, TURNS))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, turns: torch.view_as_real(torch.view_as_complex(x.reshape(2, 5, 4, 8, 2)) * turns.conj()).flatten(-2),
        lambda x, turns: torch.view_as_real(torch.view_as_complex(x.reshape(2, 5, 4, 8, 2)) * turns),
        lambda x, turns: torch.view_as_real(torch.view_as_complex(x.reshape(2, 5, 8, 4, 2)) * turns[..., :4]).view(
            x.shape
        ),
        lambda x, turns: torch.view_as_real(torch.view_as_complex(x.reshape(2, 5, 4, 8, 2)) + turns).flatten(-2),
    ],
    ids=["conjugate", "left as pairs", "of other heads", "shifted"],
)
def test_other_complex_numbers_compute_the_same(function: Function) -> None:
    outcome = analyse(function, randn(2, 5, 4, 16), TURNS)
    outcome.assert_close(3e-6)
