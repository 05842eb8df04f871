"""LayerNorm, alone and after a residual addition: the contract, rounding errors, derivatives by sympy."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import Arguments, Case, bf16, complete, evaluate, f16, f32, f64, leaves
from op_contract import contract
from op_precision import (
    assert_as_precise,
    assert_derived,
    assert_precise_on_average,
    assert_propagates,
    at,
    dtypes,
    gradient,
    random_point,
    sizes,
    symbols,
    tensors,
)

from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.kernels.ops import add_layer_norm, layer_norm

IMPLEMENTATIONS = ["pytorch", "triton"]


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=f64).to(dtype)


def arguments(dtype: torch.dtype, op: SemanticOp, *shape: int, parameters: tuple[str, ...] = ()) -> Arguments:
    summands = ["residual", "x"] if op is add_layer_norm else ["x"]
    return {
        **{name: randn(*shape, dtype=dtype) for name in summands},
        **{name: randn(shape[-1], dtype=dtype) for name in parameters},
        "eps": 1e-3,
        "out_dtype": dtype,
    }


CASES = [
    case
    for op in (layer_norm, add_layer_norm)
    for case in (
        Case(op.name, op, arguments, op, 2, 3, 5, parameters=("weight", "bias")),
        Case(f"{op.name}, no bias", op, arguments, op, 4, 5, parameters=("weight",)),
        Case(f"{op.name}, no weight", op, arguments, op, 4, 5, parameters=("bias",)),
        Case(f"{op.name}, bare", op, arguments, op, 5),
    )
]


@contract(CASES)
def test_contract(case: Case, check: Any) -> None:
    check(case)


@given(st.data())
def test_errors_are_at_most_those_of_eager(data: st.DataObject) -> None:
    op, dtype = data.draw(st.sampled_from([layer_norm, add_layer_norm])), data.draw(dtypes())
    shape = data.draw(st.lists(sizes, min_size=1, max_size=3))
    drawn: Arguments = {"eps": 1e-3, "out_dtype": dtype}
    for name in ("x", "residual") if op is add_layer_norm else ("x",):
        drawn[name] = data.draw(tensors(shape, dtype))
    for name in ("weight", "bias"):
        if data.draw(st.booleans()):
            drawn[name] = data.draw(tensors(shape[-1:], dtype))
    assert_as_precise(op, complete(op, drawn))


@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("op", [layer_norm, add_layer_norm], ids=repr)
def test_errors_on_average(op: SemanticOp, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    drawn = arguments(dtype, op, 64, 96, parameters=("weight", "bias"))
    drawn["x"] += 5  # with such a mean, a one-pass variance would cancel
    assert_precise_on_average(op, complete(op, drawn))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_infs_and_nans_propagate(case: Case) -> None:
    assert_propagates(case.op, case.arguments(f32))


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_of_the_sum_may_be_unused(used: int) -> None:
    """The norm, or the sum."""
    given_ = CASES[4].arguments()
    inputs = {n: t.requires_grad_() for n, t in leaves(given_).items()}
    mine, expected = (
        torch.autograd.grad(f(**given_)[used].square().sum(), tuple(inputs.values()), allow_unused=True)
        for f in (add_layer_norm, add_layer_norm.reference)
    )
    for gradient_, reference in zip(mine, expected, strict=True):
        assert (gradient_ is None) == (reference is None)
        if gradient_ is not None:
            torch.testing.assert_close(gradient_, reference)


def test_operands_of_the_sum_may_differ_in_dtype() -> None:
    """A float32 residual stream and a bfloat16 branch: each gradient has its operand's dtype."""
    drawn = complete(add_layer_norm, arguments(bf16, add_layer_norm, 4, 8, parameters=("weight", "bias")))
    drawn["residual"] = drawn["residual"].float()
    result = evaluate(add_layer_norm, drawn)
    assert result.outputs[1].dtype == f32
    assert [result.gradient(n).dtype for n in ("residual", "x")] == [f32, bf16]
    assert_as_precise(add_layer_norm, drawn)


@pytest.mark.float64
def test_the_backward_matches_sympy() -> None:
    x, w, b, dy = symbols("x", 3), symbols("w", 3), symbols("b", 3), symbols("dy", 3)
    eps = 0.25
    mean = sum(x) / 3
    rstd = 1 / sympy.sqrt(sum((s - mean) ** 2 for s in x) / 3 + sympy.Rational(eps))
    loss = sum(g * ((s - mean) * rstd * v + c) for g, s, v, c in zip(dy, x, w, b, strict=True))
    point = random_point(x, w, b, dy)
    inputs = [at(point, group).requires_grad_() for group in (x, w, b)]
    layer_norm(x=inputs[0], weight=inputs[1], bias=inputs[2], eps=eps, out_dtype=f64).backward(at(point, dy))
    for group, tensor in zip((x, w, b), inputs, strict=True):
        assert tensor.grad is not None
        assert_derived(tensor.grad, gradient(loss, group, point))
