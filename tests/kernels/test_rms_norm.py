"""RMSNorm, alone and after a residual addition: the contract, rounding errors, derivatives by sympy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import Arguments, Case, bf16, complete, f16, f32, f64
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
from fastlora.kernels.ops import add_rms_norm, rms_norm

IMPLEMENTATIONS = ["pytorch", "triton"]


def attributes(dtype: torch.dtype, **others: Any) -> Arguments:
    """Return the attributes of Llama's norm, which computes in float32 or wider and rounds before the weight."""
    wide = torch.promote_types(dtype, f32)
    return {
        "eps": 1e-3,
        "offset": 0.0,
        "compute_dtype": wide,
        "norm_dtype": dtype,
        "scale_dtype": dtype,
        "out_dtype": dtype,
        **others,
    }


def gemma(dtype: torch.dtype) -> Arguments:
    """Return the attributes of Gemma's norm, which stores the weight minus 1 and rounds only at the end."""
    wide = torch.promote_types(dtype, f32)
    return attributes(dtype, offset=1.0, norm_dtype=wide, scale_dtype=wide)


def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=f64).to(dtype)


def arguments(
    dtype: torch.dtype, op: SemanticOp, *shape: int, weight: bool = True, style: Callable[..., Arguments] = attributes
) -> Arguments:
    summands = ["residual", "x"] if op is add_rms_norm else ["x"]
    operands = {name: randn(*shape, dtype=dtype) for name in summands}
    return operands | ({"weight": randn(shape[-1], dtype=dtype)} if weight else {}) | style(dtype)


CASES = [
    case
    for op in (rms_norm, add_rms_norm)
    for case in (
        Case(op.name, op, arguments, op, 2, 3, 5),
        Case(f"{op.name}, bare", op, arguments, op, 5, weight=False),
        Case(f"{op.name}, offset", op, arguments, op, 4, 5, style=gemma),
    )
]


@contract(CASES)
def test_contract(case: Case, check: Any) -> None:
    check(case)


@given(st.data())
def test_errors_are_at_most_those_of_eager(data: st.DataObject) -> None:
    op, dtype = data.draw(st.sampled_from([rms_norm, add_rms_norm])), data.draw(dtypes())
    shape = data.draw(st.lists(sizes, min_size=1, max_size=3))
    drawn = data.draw(st.sampled_from([attributes, gemma]))(dtype)
    for name in ("x", "residual") if op is add_rms_norm else ("x",):
        drawn[name] = data.draw(tensors(shape, dtype))
    if data.draw(st.booleans()):
        drawn["weight"] = data.draw(tensors(shape[-1:], dtype))
    assert_as_precise(op, complete(op, drawn))


@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("style", [attributes, gemma])
@pytest.mark.parametrize("op", [rms_norm, add_rms_norm], ids=repr)
def test_errors_on_average(op: SemanticOp, style: Callable[..., Arguments], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_precise_on_average(op, complete(op, arguments(dtype, op, 64, 96, style=style)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_infs_and_nans_propagate(case: Case) -> None:
    assert_propagates(case.op, case.arguments(f32))


@pytest.mark.parametrize("used", [0, 1])
def test_either_output_of_the_sum_may_be_unused(used: int) -> None:
    """The norm, or the sum."""
    given_ = CASES[3].arguments()
    inputs = {n: given_[n].requires_grad_() for n in ("residual", "x", "weight")}
    op_grads, reference_grads = (
        torch.autograd.grad(f(**given_)[used].square().sum(), tuple(inputs.values()), allow_unused=True)
        for f in (add_rms_norm, add_rms_norm.reference)
    )
    for mine, expected in zip(op_grads, reference_grads, strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None:
            torch.testing.assert_close(mine, expected)


@pytest.mark.float64
def test_the_backward_matches_sympy() -> None:
    x, w, dy = symbols("x", 3), symbols("w", 3), symbols("dy", 3)
    eps, offset = 0.25, 1.0
    rstd = 1 / sympy.sqrt(sum(s**2 for s in x) / 3 + sympy.Rational(eps))
    loss = sum(g * s * rstd * (1 + v) for g, s, v in zip(dy, x, w, strict=True))
    point = random_point(x, w, dy)
    given_x, given_w = at(point, x).requires_grad_(), at(point, w).requires_grad_()
    rms_norm(x=given_x, weight=given_w, **attributes(f64, eps=eps, offset=offset)).backward(at(point, dy))
    assert given_x.grad is not None
    assert given_w.grad is not None
    assert_derived(given_x.grad, gradient(loss, x, point))
    assert_derived(given_w.grad, gradient(loss, w, point))
