"""Gated linear units: the contract, derivatives by sympy, rounding errors, and the kernels' memory accesses."""

from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import DEVICE, Arguments, Case, bf16, cotangents, evaluate, f16, f32, f64, on_device
from op_contract import contract
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
from op_spies import launches

from fastlora.kernels.core import implementations
from fastlora.kernels.formulas.glu import activate, backward, derivative, forward
from fastlora.kernels.ops import glu

IMPLEMENTATIONS = ["pytorch", "triton"]

z = sympy.Symbol("z", real=True)
FORMULAS = {
    "silu": z / (1 + sympy.exp(-z)),
    "gelu": z * (1 + sympy.erf(z / sympy.sqrt(2))) / 2,
    "gelu_tanh": z * (1 + sympy.tanh(sympy.sqrt(2 / sympy.pi) * (z + sympy.Rational("0.044715") * z**3))) / 2,
}


def randn(*shape: int) -> torch.Tensor:
    return on_device(torch.randn(shape))


def arguments(dtype: torch.dtype, activation: str, *shape: int) -> Arguments:
    gate, up = (torch.randn(shape, dtype=f64).to(dtype) for _ in range(2))
    return {"gate": gate, "up": up, "activation": activation, "out_dtype": dtype}


CASES = [Case(name, glu, arguments, name, 2, 3, 5) for name in FORMULAS]


@contract(CASES)
def test_contract(case: Case, check: Any) -> None:
    check(case)


@given(st.data())
def test_errors_are_at_most_those_of_eager(data: st.DataObject) -> None:
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


@pytest.mark.pytorch_only
@pytest.mark.parametrize("activation", FORMULAS)
def test_activation_and_derivative_match_sympy(activation: str) -> None:
    points = torch.cat((torch.linspace(-6, 6, 41, dtype=f64), torch.tensor([0.0, 1e-9, -40.0, 40.0], dtype=f64)))
    for code, formula in ((activate, FORMULAS[activation]), (derivative, sympy.diff(FORMULAS[activation], z))):
        expected = torch.tensor([value(formula, {z: point}) for point in points.tolist()], dtype=f64)
        assert_derived(code(points, activation), expected)


def test_an_unknown_activation_raises() -> None:
    with implementations.only("pytorch"), pytest.raises(ValueError, match="one of silu, gelu, gelu_tanh; got 'relu'"):
        glu(**arguments(f32, "relu", 2, 3))


# ---- tests of the Triton implementation


@pytest.fixture
def triton_only(implementation: str) -> None:
    if implementation != "triton":
        pytest.skip("only about the Triton implementation")


@pytest.mark.usefixtures("triton_only")
@pytest.mark.parametrize("activation", FORMULAS)
def test_large_and_small_inputs_are_precise(activation: str) -> None:
    """In float32, without cancellation near 0 and without overflow of intermediate results."""
    points = torch.cat([sign * torch.logspace(-30, 4, 120, dtype=f64).float() for sign in (1, -1)])
    result = evaluate(glu, {"gate": points, "up": torch.ones_like(points), "activation": activation, "out_dtype": f32})
    grads = cotangents(result.outputs)[0]
    exact = points.double().cpu()
    truth = {"gate": grads.cpu() * derivative(exact, activation), "up": grads.cpu() * activate(exact, activation)}
    for found, true in (
        (result.outputs[0], activate(exact, activation)),
        *((result.gradient(n), truth[n]) for n in truth),
    ):
        torch.testing.assert_close(found.double().cpu(), true, rtol=2e-6, atol=1e-6)
        assert found.isfinite().all()


@pytest.mark.usefixtures("triton_only")
def test_halves_of_a_fused_projection_are_not_copied() -> None:
    """Rows may have any stride: gate and up are read, and their gradients are written, in place."""
    from fastlora.kernels.triton.glu import run_backward, run_forward

    both, dy = randn(6, 10), randn(6, 5)
    gate, up = both.chunk(2, dim=-1)
    wide, dboth = torch.full((6, 8), 7.0, device=DEVICE), torch.full((6, 10), torch.nan, device=DEVICE)
    run_forward(gate, up, "silu", wide[:, :5])
    assert (wide[:, 5:] == 7).all()
    torch.testing.assert_close(wide[:, :5], forward(gate, up, "silu", f32)[0])
    run_backward(dy, gate, up, "silu", *dboth.chunk(2, dim=-1))
    expected = backward({"gate": True, "up": True}, [dy], gate, up, "silu")
    torch.testing.assert_close(dboth, torch.cat((expected["gate"], expected["up"]), dim=-1))


@pytest.mark.usefixtures("triton_only")
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True), (False, False)])
def test_backward_recomputes_the_hidden_state_in_place(
    wanted: tuple[bool, bool],
) -> None:
    from fastlora.kernels.triton.glu import run_backward

    gate, up, dy = (randn(6, 5) for _ in range(3))
    requested = dict(zip(("gate", "up"), wanted, strict=True))
    expected = backward(requested, [dy], gate, up, "gelu_tanh")
    (hidden,) = forward(gate, up, "gelu_tanh", f32)
    found = {name: t for name, t in (("gate", gate), ("up", up)) if requested[name]}
    with launches() as launched:
        run_backward(dy, gate, up, "gelu_tanh", found.get("gate"), found.get("up"), dy)
    assert launched == ["backward_kernel"]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dy, hidden)


@pytest.mark.usefixtures("triton_only")
def test_one_launch_forward_and_one_backward() -> None:
    with launches() as launched:
        evaluate(glu, CASES[0].arguments())
    assert launched == ["forward_kernel", "backward_kernel"]
