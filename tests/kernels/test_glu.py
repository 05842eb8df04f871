from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import CONTRACT, Arguments, Case, bf16, f16, f32, f64
from op_precision import (
    assert_as_precise,
    assert_derived,
    assert_precise_on_average,
    assert_propagates,
    assert_rounded_once,
    dtypes,
    sizes,
    tensors,
    value,
)

from fastlora.kernels.glu import activate, derivative
from fastlora.kernels.ops import glu

z = sympy.Symbol("z", real=True)
FORMULAS = {
    "silu": z / (1 + sympy.exp(-z)),
    "gelu": z * (1 + sympy.erf(z / sympy.sqrt(2))) / 2,
    "gelu_tanh": z * (1 + sympy.tanh(sympy.sqrt(2 / sympy.pi) * (z + sympy.Rational("0.044715") * z**3))) / 2,
}


def arguments(dtype: torch.dtype, activation: str, *shape: int) -> Arguments:
    gate, up = (torch.randn(shape, dtype=f64).to(dtype) for _ in range(2))
    return {"gate": gate, "up": up, "activation": activation, "out_dtype": dtype}


CASES = [Case(name, glu, arguments, name, 2, 3, 5) for name in FORMULAS]


@pytest.mark.parametrize("check", CONTRACT)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case, check: Any) -> None:
    check(case)


@given(st.data())
def test_errors_are_no_larger_than_eager_ones(data: st.DataObject) -> None:
    shape = data.draw(st.lists(sizes, min_size=1, max_size=3))
    gate_dtype, up_dtype = data.draw(st.sampled_from([(f32, f32), (bf16, bf16), (f16, f16), (bf16, f32), (f32, f16)]))
    drawn = {
        "gate": data.draw(tensors(shape, gate_dtype)),
        "up": data.draw(tensors(shape, up_dtype)),
        "activation": data.draw(st.sampled_from(list(FORMULAS))),
        "out_dtype": data.draw(dtypes()),
    }
    assert_as_precise(glu, drawn)


@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("activation", FORMULAS)
def test_errors_on_average(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_precise_on_average(glu, arguments(dtype, activation, 64, 96))


@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize("activation", FORMULAS)
def test_half_precision_is_rounded_once(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_rounded_once(glu, arguments(dtype, activation, 64, 96))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_infs_and_nans_propagate(case: Case) -> None:
    assert_propagates(glu, case.arguments(f32))


@pytest.mark.parametrize("activation", FORMULAS)
def test_activation_and_derivative_are_sympys(activation: str) -> None:
    points = torch.cat((torch.linspace(-6, 6, 41, dtype=f64), torch.tensor([0.0, 1e-9, -40.0, 40.0], dtype=f64)))
    for code, formula in ((activate, FORMULAS[activation]), (derivative, sympy.diff(FORMULAS[activation], z))):
        expected = torch.tensor([value(formula, {z: point}) for point in points.tolist()], dtype=f64)
        assert_derived(code(points, activation), expected)


def test_unknown_activation() -> None:
    with pytest.raises(ValueError, match="'relu' is none of silu, gelu, gelu_tanh"):
        glu(**arguments(f32, "relu", 2, 3))
