"""Patterns match only what they mention: every other argument must have its default."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import analyse, randn, view_of
from torch import Tensor

import fastlora
from fastlora.graph.canonical_ops import operation, operations, seen_instead, signature_of, spell
from fastlora.graph.signature import parse
from fastlora.kernels import ops
from fastlora.match.dsl import Op, Scalar, silu
from fastlora.match.rule import Rule, dtype_of, rule

X, Y = randn(2, 3, 8), randn(2, 3, 8, seed=1)
GLU: dict[str, Any] = {"activation": "silu", "out_dtype": dtype_of()}


@torch._dynamo.allow_in_graph
def _swish(x: Tensor, beta: float = 1.0, scale: float | None = None) -> Tensor:
    return x * torch.sigmoid(beta * x) * (1.0 if scale is None else scale)


spell("closed_swish", "input beta=1.0 scale=None", _swish)


@rule(ops.glu, anchor="closed_swish", attrs=GLU)
def default_swish(gate, up):
    return Op("closed_swish", input=gate) * up


@rule(ops.glu, anchor="closed_swish", attrs=GLU)
def any_swish(gate, up):
    return Op("closed_swish", input=gate, beta=lambda beta: True) * up


@pytest.mark.parametrize("beta", [1.0, 1], ids=str)
def test_a_pattern_may_mention_an_argument_with_its_default(beta: float) -> None:
    outcome = analyse(lambda x, y: _swish(x, beta) * y, X, Y, rules=[default_swish])
    assert outcome.ops == ["glu"]
    outcome.assert_close()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x, y: _swish(x, 1.702) * y, "closed_swish has beta=1.702, which the pattern does not mention"),
        (lambda x, y: _swish(x, beta=True) * y, "closed_swish has beta=True, which"),
        (lambda x, y: _swish(x, scale=2.0) * y, "closed_swish has scale=2.0, which"),
        (lambda x, y: _swish(x, scale=y.shape[0]) * y, "closed_swish has scale=2, which"),
    ],
    ids=["another number", "a truth value", "none is the default", "a size"],
)
def test_unmentioned_arguments_must_have_their_defaults(function: Any, reason: str) -> None:
    outcome = analyse(function, X, Y, rules=[default_swish])
    assert not outcome.ops
    assert reason in outcome.missed()
    outcome.assert_identical()


def test_a_predicate_accepts_any_constant() -> None:
    outcome = analyse(lambda x, y: _swish(x, 1.702) * y, X, Y, rules=[any_swish])
    assert outcome.ops == ["glu"]


def test_a_symbolic_number_is_not_a_default() -> None:
    outcome = analyse(lambda x, y: _swish(x, x.shape[0]) * y, X, Y, rules=[default_swish], dynamic=True)
    assert not outcome.ops
    outcome.assert_identical()


def test_later_spellings_are_also_matched_with_defaults() -> None:
    """A second spelling adds an argument, which the earlier rule does not mention."""

    def first(x):
        return F.silu(x)

    def second(x, power=1):
        return F.silu(x) ** power

    first, second = map(torch._dynamo.allow_in_graph, (first, second))
    spell("closed_later", "input", first)

    @rule(ops.glu, attrs=GLU)
    def later(gate, up):
        return Op("closed_later", input=gate) * up

    spell("closed_later", "input power=1", second)
    fused = [analyse(lambda x, y, f=f: f(x) * y, X, Y, rules=[later]).ops for f in (first, second)]
    assert fused == [["glu"], ["glu"]]
    assert not analyse(lambda x, y: second(x, 2) * y, X, Y, rules=[later]).ops


def test_arguments_with_different_defaults_have_none() -> None:
    def one(x, beta=1.0):
        return x

    def two(x, beta=2.0):
        return x

    spell("closed_twice", "input beta=1.0", one)
    spell("closed_twice", "input beta=2.0", two)
    with pytest.raises(fastlora.RuleError, match="closed_twice has no default for 'beta': mention it"):

        @rule(ops.glu, attrs=GLU)
        def unclear(gate, up):
            return Op("closed_twice", input=gate) * up


@pytest.mark.parametrize(
    ("op", "signature", "targets", "reason"),
    [
        ("closed_a", "input beta = 1.0", (len,), "'=' is not an argument: write name or name=value"),
        ("closed_a", "input input", (len,), "'input' is listed twice"),
        ("closed_a", "input", (), "pass at least one spelling"),
        ("closed_a", "input", (3,), "3 is neither a callable nor the name"),
        ("closed_a", "input", (torch.tanh,), "is already a spelling of 'tanh'"),
        ("closed_a", "input", ("tanh",), "'tanh' is already a spelling of 'tanh'"),
        ("silu", "x", (len,), "'silu' has no argument 'x', but input inplace=False"),
        ("slice", "input start stop step by=1", (len,), "'slice' has no argument 'by'"),
        ("linear", "input weight bias", (F.silu,), "is already a spelling of 'silu'"),
        ("linear", "input bias=None", (len,), "'linear' needs the argument 'weight'"),
        ("tanh", "input scale", (len,), "'tanh' has no argument 'scale', but input"),
    ],
)
def test_an_invalid_spelling_is_an_error(op: str, signature: str, targets: Any, reason: str) -> None:
    before = signature_of(op)
    with pytest.raises(fastlora.RuleError, match=re.escape(f"spell({op!r}, {signature!r}): ")) as error:
        spell(op, signature, *targets)
    assert reason in str(error.value)
    assert str(error.value).startswith(f"{__file__}:")
    assert signature_of(op) == before


# ---- the table of what patterns see

Function = Callable[..., Any]
TERMS: list[Function] = [
    lambda x, y: x + y,
    lambda x, y: torch.add(x, y, alpha=1),
    lambda x, y: x - y,
    lambda x, y: x * y,
    lambda x, y: x * x,
    lambda x, y: x / y,
    lambda x, y: torch.div(x, y, rounding_mode=None),
    lambda x, y: -x,
    lambda x, y: x**3,
    lambda x, y: (x.sqrt(), x.rsqrt(), x.reciprocal(), x.tanh(), x.sigmoid(), x.detach()),
    lambda x, y: (x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)),
    lambda x, y: torch.linalg.norm(x, dim=1),
    lambda x, y: (F.silu(x), F.gelu(x), F.gelu(x, approximate="tanh")),
    lambda x, y: (F.linear(x, y[0]), x @ y[0].T, x @ y.mT),
    lambda x, y: torch.baddbmm(x, x, torch.ones(2, 8, 8)),
    lambda x, y: torch.einsum("ijk,ijk->ij", x, y),
    lambda x, y: (torch.cat((x, y), -1), torch.stack((x, y), -1).flatten(-2), torch.stack((x, y), -1).view(2, 3, 16)),
    lambda x, y: (x.chunk(2, -1)[0], x[..., 2:], x.reshape(6, 8)),
    lambda x, y: F.dropout(x, 0.5),
    lambda x, y: torch.dropout(x, 0.5, True),
    lambda x, y: (F.layer_norm(x, (8,)), torch.layer_norm(x, (8,), cudnn_enable=False), F.rms_norm(x, (8,))),
    lambda x, y: F.cross_entropy(x[0], torch.ones(3, dtype=torch.int64)),
    lambda x, y: x.log_softmax(-1).gather(-1, torch.ones(2, 3).long().unsqueeze(-1)).squeeze(-1),
    lambda x, y: F.log_softmax(x, dim=-1),
    lambda x, y: x + torch.eye(8)[:3],
    lambda x, y: x.to(torch.float64),
    lambda x, y: torch._grouped_mm(x[0].bfloat16(), y.mT.bfloat16(), torch.tensor([1, 3], dtype=torch.int32)),
]


def _terms(function: Function) -> list[Any]:
    view = view_of(function, X.detach(), Y.detach())
    return [term for node in view.producers() if (term := view.term(node)) is not None]


def test_terms_have_the_declared_arguments() -> None:
    terms = [term for function in TERMS for term in _terms(function)]
    for term in terms:
        signature = signature_of(term.op)
        if signature is None:
            assert seen_instead(term.op), term
        else:
            assert set(term.args) == set(signature.names), term
    declared = map(operation, operations())
    read = {op.name for op in declared if op.read is not None or op.arguments != op.called}
    assert read <= {term.op for term in terms}


def test_a_signature_prints_as_written() -> None:
    assert str(parse("input other alpha=1 rounding=none dim=(1,2)")) == "input other alpha=1 rounding='none' dim=(1, 2)"


# ---- what can be seen only once there is a match


def _computing(**attrs: Any) -> Rule:
    @rule(ops.glu, attrs={**GLU, **attrs})
    def computed(gate, up, _scale: Scalar):
        return (silu(gate) * up) * _scale

    return computed


NAME = "activation"


@pytest.mark.parametrize(
    ("attrs", "reason"),
    [
        ({"activation": lambda match: "swoosh"}, "attrs activation='swoosh' is not a valid activation of glu"),
        ({"activation": lambda match: None}, "attrs activation=None: glu("),
        ({"out_dtype": lambda match: 32}, "attrs out_dtype=32: glu("),
        ({"activation": lambda match: match.value(NAME)}, "nothing is captured or named 'activation'"),
        ({"activation": lambda match: match.tag(NAME)}, "no either is named 'activation'"),
        ({"out_dtype": lambda match: match.dtype("_scale")}, "'_scale' is not a tensor in this match"),
        ({"activation": lambda match: match.slice_of("gate")}, "'gate' is not a slice in this match"),
    ],
)
def test_an_invalid_computed_attribute_is_an_error(attrs: dict[str, Any], reason: str) -> None:
    made = _computing(**attrs)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=re.escape(reason)) as error:
        analyse(lambda x, y: F.silu(x) * y * 2.0, X, Y, rules=[made])
    assert isinstance(error.value.inner_exception, fastlora.RuleError)
    assert str(error.value.inner_exception).startswith(f"{made.source}: rule computed: ")
