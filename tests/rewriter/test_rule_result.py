"""Rules whose pattern is an expression around their op: `result=`, from the definition to the graph."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import analyse, bf16, randn
from torch import Tensor

import fastlora
from fastlora.kernels import ops
from fastlora.match.dsl import Param, Scalar, linear, reshape, silu, tanh
from fastlora.match.rule import Rule, dtype_of, rule
from fastlora.patterns.lora import shared_input
from fastlora.rewrite.refusal import Code

X, Y = randn(2, 3, 8), randn(2, 3, 8, seed=1)
GLU: dict[str, Any] = {"activation": "silu", "out_dtype": dtype_of()}


def negated(result: Callable[..., Any], **options: Any) -> Rule:
    @rule(ops.glu, anchor="silu", attrs=GLU, result=result, **options)
    def minus_swiglu(gate, up):
        return -(silu(gate) * up)

    return minus_swiglu


def minus(x: Tensor, y: Tensor) -> Tensor:
    return -(F.silu(x) * y)


def test_the_op_and_the_expression_replace_the_pattern() -> None:
    outcome = analyse(minus, X, Y, rules=[negated(lambda y: -y)], verify=True)
    assert outcome.ops == ["glu"]
    assert outcome.targets()[-1] == "neg"
    (made,) = outcome.rewrites
    nodes = [node for node in made.graph.nodes if node.op == "call_function"]
    assert all(isinstance(node.meta.get("example_value"), Tensor) for node in nodes)
    outcome.assert_tidy()
    outcome.assert_close()


def test_an_expression_reads_arguments_of_the_op() -> None:
    @rule(ops.glu, attrs=GLU, result=lambda y, gate: y.view_as(gate) / 2 - gate)
    def odd(gate, up):
        return (silu(gate) * up) / 2 - gate

    outcome = analyse(lambda x, y: (F.silu(x) * y) / 2 - x, X, Y, rules=[odd], verify=True)
    assert outcome.ops == ["glu"], outcome.turned_down()
    outcome.assert_close()


def test_an_expression_may_reshape() -> None:
    @rule(ops.glu, attrs=GLU, result=lambda y: y.view(6, 8))
    def flat(gate, up):
        return reshape(silu(gate) * up)

    outcome = analyse(lambda x, y: (F.silu(x) * y).view(6, 8), X, Y, rules=[flat], verify=True)
    assert outcome.ops == ["glu"]
    outcome.assert_close()


@pytest.mark.parametrize(
    "result",
    [lambda y: y.view(6, 8), lambda y: (-y).double(), lambda y: -y[..., :4]],
    ids=["shape", "dtype", "size"],
)
def test_an_expression_with_other_metadata_is_refused(result: Callable[..., Any]) -> None:
    outcome = analyse(minus, X, Y, rules=[negated(result)])
    assert not outcome.ops
    assert Code.METADATA in outcome.codes()
    outcome.assert_identical()


@pytest.mark.parametrize("result", [lambda y: y + 0.0, lambda y: -y * 1.001], ids=["sign", "factor"])
def test_an_expression_that_computes_something_else_fails_verification(result: Callable[..., Any]) -> None:
    outcome = analyse(minus, X, Y, rules=[negated(result)], verify=True)
    assert not outcome.ops
    assert Code.NUMERICS in outcome.codes()
    outcome.assert_identical()


def test_a_replay_in_the_traced_dtype_includes_the_expression() -> None:
    x, y = (t.detach().to(bf16).requires_grad_() for t in (X, Y))
    outcome = analyse(minus, x, y, rules=[negated(lambda y: -y)], verify=True)
    assert outcome.ops == ["glu"]
    outcome.assert_close(2e-2)


def test_matches_with_an_expression_are_not_raised() -> None:
    """A group or a fusing rule would otherwise read the op's output, without the expression."""
    adapter = (randn(24, 16, grad=False), randn(4, 16), randn(24, 4))

    def plain(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0

    attrs = {"base_dtype": dtype_of("base"), "lora_dtype": dtype_of("inner"), "out_dtype": dtype_of()}

    @rule(ops.lora_linear, attrs=attrs, result=operator.neg)
    def minus_lora(x, weight: Param(2), lora_a: Param(2), lora_b: Param(2), scaling: Scalar):
        base = linear(x, weight).named("base")
        return -(base + linear(linear(x, lora_a).named("inner"), lora_b) * scaling)

    x = randn(2, 3, 16)
    function = lambda x, *layers: (-plain(x, *layers[:3]), -plain(x, *layers[3:]))  # noqa: E731
    outcome = analyse(function, x, *adapter, *adapter, rules=[minus_lora, shared_input])
    assert outcome.ops == ["lora_linear", "lora_linear"]
    outcome.assert_close()


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (lambda: 0, "result= takes 0 values, but glu has 1 outputs"),
        (lambda y, gat: -y, "result= takes 'gat', which is not a tensor argument of glu: did you mean 'gate'?"),
        (lambda y, activation: -y, "result= takes 'activation', which is not a tensor argument"),
        (lambda y: torch.tanh(y), "result= calls tanh: only negation, arithmetic, slices, casts and reshapes"),
        (lambda y: y.add_(1), "result= calls add_: only"),
        (lambda y: F.dropout(y), "result= calls dropout: only"),
        (lambda y: y.detach(), "result= calls detach: only"),
        (lambda y: (y, y), "returns 1 values, but result= 2"),
        (lambda y: 3.0, "result= must return values that are computed from the op's outputs"),
        (lambda y, gate: -gate, "result= must return values that are computed from the op's outputs"),
        (lambda y: y.swoosh, "result= calls getattr: only"),
        (lambda y: 1 if y else 0, "result= raises TraceError"),
        ("neg", "'neg' is not a function of outputs"),
    ],
)
def test_an_invalid_expression_is_an_error(result: Any, reason: str) -> None:
    with pytest.raises(fastlora.RuleError, match=re.escape(reason)) as error:
        negated(result)
    assert str(error.value).startswith(f"{__file__}:")


def test_an_op_with_list_outputs_takes_no_expression() -> None:
    with pytest.raises(fastlora.RuleError, match="whose outputs are lists"):

        @rule(ops.rotary_group, result=lambda y: -y)
        def grouped(x):
            return tanh(x)


@pytest.mark.parametrize(
    "result",
    [
        lambda y: y if isinstance(y, torch.Tensor) else y.double(),
        lambda y: y if isinstance(y, torch.Tensor) else y[:1],
    ],
    ids=["dtype", "shape"],
)
def test_the_recorded_expression_is_used_everywhere(result: Callable[..., Any]) -> None:
    """The function may return something else when it is called again."""
    outcome = analyse(lambda x, y: -(F.silu(x) * y), X, Y, rules=[negated(result)])
    assert not outcome.chosen
    assert [refusal.code for _, refusal in outcome.refused] == [Code.METADATA]


def test_expressions_take_no_optional_arguments_or_integers() -> None:
    with pytest.raises(fastlora.RuleError, match="result= reads 'bias', which may be None"):

        @rule(ops.lora_linear, result=lambda y, bias: y * bias)
        def shifted(x, weight):
            return linear(x, weight)

    with pytest.raises(fastlora.RuleError, match="only negation, arithmetic, slices, casts and reshapes"):
        negated(lambda y: y.to(torch.int64).to(torch.float32))
