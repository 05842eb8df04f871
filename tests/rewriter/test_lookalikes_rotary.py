"""Graphs that resemble a rotary embedding are not fused, or only a smaller part of them is."""

from __future__ import annotations

import pytest
import torch
from graphs import Lookalike, analyse, distance, randn, rotary, rotate_half

Q, K = randn(2, 3, 4, 8), randn(2, 3, 4, 8, seed=1)
COS, SIN = randn(4, 8, grad=False), randn(4, 8, seed=1, grad=False)
TABLES = (COS, SIN)


def turned_with(turn):
    return lambda x, cos, sin: x * cos + turn(x) * sin


def escaping_turn(x, cos, sin):
    turn = rotate_half(x)
    return x * cos + turn * sin, turn


def mutated_between_halves(x, cos, sin):
    x = x * 1.5
    second = -x[..., 4:]
    x.add_(1)
    return x * cos + torch.cat((second, x[..., :4]), -1) * sin


def mutated_turn(x, cos, sin):
    turn = rotate_half(x)
    turn[..., 0] = 0.0
    return x * cos + turn * sin


def turned_without_gradients(x, cos, sin):
    with torch.no_grad():
        turn = rotate_half(x)
    return x * cos + turn * sin


def partly(turning: slice, passing: slice, first: bool = True):
    def function(x, cos, sin):
        turned = rotary(x[..., turning], cos, sin)
        return torch.cat((turned, x[..., passing]) if first else (x[..., passing], turned), -1)

    return function


HALF = (COS[:, :4].clone(), SIN[:, :4].clone())
QUARTER = (COS[:, :2].clone(), SIN[:, :2].clone())
NARROW = (COS[:, :1].clone(), SIN[:, :1].clone())

ROTARIES = [
    Lookalike(
        "the signed half stays in its place",
        turned_with(lambda x: torch.cat((x[..., :4], -x[..., 4:]), -1)),
        (Q, *TABLES),
        missed="expected the slice",
    ),
    Lookalike(
        "both halves are negated", turned_with(lambda x: torch.cat((-x[..., 4:], -x[..., :4]), -1)), (Q, *TABLES)
    ),
    Lookalike("no half is negated", turned_with(lambda x: torch.cat((x[..., 4:], x[..., :4]), -1)), (Q, *TABLES)),
    Lookalike(
        "the slices are unequal",
        turned_with(lambda x: torch.cat((-x[..., 3:], x[..., :3]), -1)),
        (Q, *TABLES),
        missed="expected the slice",
    ),
    Lookalike(
        "the width is odd",
        rotary,
        (randn(2, 3, 4, 5), randn(4, 5, grad=False), randn(4, 5, seed=1, grad=False)),
    ),
    Lookalike(
        "the slices are of another dimension",
        turned_with(lambda x: torch.cat((-x[..., 2:, :], x[..., :2, :]), -2)),
        (Q, *TABLES),
    ),
    Lookalike(
        "the halves are of two values",
        lambda x, y, cos, sin: x * cos + torch.cat((-x[..., 4:], y[..., :4]), -1) * sin,
        (Q, K, *TABLES),
        missed="is not",
    ),
    Lookalike(
        "another value turns", lambda x, y, cos, sin: x * cos + rotate_half(y) * sin, (Q, K, *TABLES), missed="is not"
    ),
    Lookalike(
        "the turned value is detached", turned_with(lambda x: rotate_half(x.detach())), (Q, *TABLES), missed="is not"
    ),
    Lookalike("the turned value is subtracted", lambda x, cos, sin: x * cos - rotate_half(x) * sin, (Q, *TABLES)),
    Lookalike(
        "the rotated value is doubled",
        lambda x, cos, sin: x * cos + 2 * rotate_half(x) * sin,
        (Q, *TABLES),
        missed="rotary",
    ),
    Lookalike("cosine and sine are narrower than x", rotary, (Q, *NARROW), missed="not as wide"),
    Lookalike("the cosine is a number", lambda x, sin: x * 0.5 + rotate_half(x) * sin, (Q, SIN), missed="rotary"),
    Lookalike(
        "cosine and sine are numbers of the graph",
        lambda x: x * x.shape[1] + rotate_half(x) * x.shape[2],
        (Q,),
        dynamic=True,
    ),
    Lookalike(
        "cosine and sine enlarge x",
        rotary,
        (randn(1, 3, 4, 8), randn(2, 1, 4, 8, grad=False), randn(2, 1, 4, 8, seed=1, grad=False)),
        missed="larger than x",
    ),
    Lookalike("the turned value leaves the graph", escaping_turn, (Q, *TABLES), missed="leaves the graph as an output"),
    Lookalike("x is written between the halves", mutated_between_halves, (Q, *TABLES), missed="in place"),
    Lookalike("the turned value is overwritten", mutated_turn, (Q, *TABLES), missed="setitem"),
    Lookalike(
        "the turned value has no gradients",
        turned_without_gradients,
        (Q, *TABLES),
        missed="gradient or autocast modes",
    ),
    Lookalike(
        "pairs with the sign on the even ones",
        turned_with(lambda x: torch.stack((x[..., 1::2], -x[..., 0::2]), -1).flatten(-2)),
        (Q, *TABLES),
        missed="rotary",
    ),
    Lookalike(
        "pairs that stay in their places",
        turned_with(lambda x: torch.stack((-x[..., 0::2], x[..., 1::2]), -1).flatten(-2)),
        (Q, *TABLES),
        missed="expected the slice",
    ),
    Lookalike(
        "pairs joined as halves",
        turned_with(lambda x: torch.cat((-x[..., 1::2], x[..., 0::2]), -1)),
        (Q, *TABLES),
        missed="expected the slice",
    ),
    Lookalike(
        "halves joined as pairs",
        turned_with(lambda x: torch.stack((-x[..., 4:], x[..., :4]), -1).flatten(-2)),
        (Q, *TABLES),
        missed="expected the slice",
    ),
    Lookalike(
        "pairs joined to other dimensions than they came from",
        turned_with(lambda x: torch.stack((-x[..., 1::2], x[..., 0::2]), -1).transpose(1, 2).reshape_as(x)),
        (Q, *TABLES),
    ),
    Lookalike(
        "pairs stacked before the last dimension",
        turned_with(lambda x: torch.stack((-x[..., 1::2], x[..., 0::2]), -2).flatten(-2)),
        (Q, *TABLES),
    ),
    Lookalike(
        "the part that passes overlaps",
        partly(slice(0, 4), slice(2, None)),
        (Q, *HALF),
        ("rotary",),
        refused="the rotated part",
    ),
    Lookalike(
        "a part is missing", partly(slice(0, 4), slice(6, None)), (Q, *HALF), ("rotary",), refused="the rotated part"
    ),
    Lookalike(
        "the last entries are missing",
        partly(slice(0, 4), slice(4, 6)),
        (Q, *HALF),
        ("rotary",),
        refused="the rotated part",
    ),
    Lookalike(
        "the first entries are missing",
        partly(slice(2, 4), slice(4, 8)),
        (Q, *QUARTER),
        ("rotary",),
        refused="the rotated part",
    ),
    Lookalike("the last entries turn", partly(slice(4, 8), slice(0, 4), first=False), (Q, *HALF), ("rotary",)),
    Lookalike("the turned part comes last", partly(slice(0, 4), slice(4, 8), first=False), (Q, *HALF), ("rotary",)),
    Lookalike(
        "the turning part has narrow tables", partly(slice(0, 4), slice(4, 8)), (Q, *NARROW), missed="not as wide"
    ),
    Lookalike(
        "another value passes",
        lambda x, y, cos, sin: torch.cat((rotary(x[..., :4], cos, sin), y[..., 4:]), -1),
        (Q, K, *HALF),
        ("rotary",),
    ),
]


@pytest.mark.parametrize("case", ROTARIES, ids=str)
def test_rotary_lookalikes_are_not_fused(case: Lookalike) -> None:
    case.check()


def test_swapped_cosine_and_sine_are_swapped_in_the_op() -> None:
    outcome = analyse(lambda x, cos, sin: x * sin + rotate_half(x) * cos, Q, *TABLES)
    assert outcome.ops == ["rotary"]
    assert distance(outcome.rewritten.outputs[0], rotary(Q, SIN, COS)) < 1e-6
    outcome.assert_close()
