"""The gated MLP with LoRA as one op: the contract, rounding errors, saved and recomputed tensors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import SCHEMES, Scheme, layer, layers, scheme_of, schemes
from op_cases import Arguments, Case, call_directly, complete, evaluate, f32, f64, leaves
from op_contract import contract
from op_precision import assert_as_precise, assert_precise_on_average, assert_propagates, sizes, tensors
from op_spies import saved_for_backward

from fastlora.kernels.core.recompute import recomputing
from fastlora.kernels.ops import lora_mlp

ACTIVATIONS = ["silu", "gelu", "gelu_tanh"]

IMPLEMENTATIONS = ["pytorch", "triton"]


def dtypes(scheme: Scheme) -> Arguments:
    return scheme.attributes() | {"proj_dtype": scheme.out, "hidden_dtype": scheme.out}


def prefixed(projection: str, parameters: dict[str, Any]) -> Arguments:
    return {f"{projection}_{name}": value for name, value in parameters.items()}


def arguments(
    dtype: Scheme | torch.dtype, *x: int, inner: int, rank: int, activation: str = "silu", biases: bool = False
) -> Arguments:
    scheme = scheme_of(dtype)
    width = x[-1]
    shapes = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    parameters = [prefixed(p, layer(scheme, n, k, rank, biases)) for p, (n, k) in shapes.items()]
    merged = {name: value for group in parameters for name, value in group.items()}
    return {"x": torch.randn(x, dtype=f64).to(scheme.x), **merged, "activation": activation, **dtypes(scheme)}


CASES = [
    *(Case(a, lora_mlp, arguments, 2, 3, 4, inner=5, rank=2, activation=a) for a in ACTIVATIONS),
    Case("biases", lora_mlp, arguments, 3, 4, inner=5, rank=1, biases=True),
]


@contract(CASES)
def test_contract(case: Case, check: Any) -> None:
    check(case)


@given(st.data())
def test_errors_are_at_most_those_of_eager(data: st.DataObject) -> None:
    scheme = data.draw(schemes())
    tokens, width, inner, rank = (data.draw(sizes) for _ in range(4))
    drawn: Arguments = {
        "x": data.draw(tensors((tokens, width), scheme.x)),
        "activation": data.draw(st.sampled_from(ACTIVATIONS)),
        **dtypes(scheme),
    }
    for projection, (n, k) in {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}.items():
        drawn |= prefixed(projection, data.draw(layers(scheme, n, k, rank)))
    assert_as_precise(lora_mlp, complete(lora_mlp, drawn))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_errors_on_average(scheme: Scheme, activation: str) -> None:
    torch.manual_seed(0)
    given_ = arguments(scheme, 96, 64, inner=80, rank=8, activation=activation, biases=True)
    assert_precise_on_average(lora_mlp, given_)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_infs_and_nans_propagate(case: Case) -> None:
    assert_propagates(lora_mlp, case.arguments(f32))


def test_the_hidden_activation_is_not_saved() -> None:
    """Of the tensors of its size only gate and up are saved; x is not saved if every A is frozen."""
    given_ = arguments(f32, 7, 4, inner=11, rank=3)
    for names, expected in ((("lora_a", "lora_b"), [(7, 4), (7, 11), (7, 11)]), (("lora_b",), [(7, 11), (7, 11)])):
        with saved_for_backward() as saved:
            evaluate(lora_mlp, given_, ["x", *(n for n in leaves(given_) if n.endswith(names))])
        assert sorted(tuple(t.shape) for t in saved if t.shape in {(7, 4), (7, 11)}) == expected


def test_only_the_last_backward_overwrites_saved_tensors() -> None:
    given_ = complete(lora_mlp, arguments(f32, 7, 4, inner=11, rank=3))
    wanted = [t.requires_grad_() for t in given_.values() if isinstance(t, torch.Tensor)]
    with saved_for_backward() as saved:
        y, *others = call_directly(lora_mlp, given_)
    assert others == []  # there is no other reference to tensors that are overwritten
    kept = [t.clone() for t in saved]
    first = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    for now, before in zip(saved, kept, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0, equal_nan=True)
    for found, expected in zip(torch.autograd.grad(y.sum(), wanted), first, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recomputing_saves_neither_gate_nor_up_and_changes_no_bit(case: Case) -> None:
    found = []
    for context in (nullcontext(), recomputing()):
        values = case.arguments(f32)
        wanted = list(leaves(values).values())
        for t in wanted:
            t.requires_grad_()
        with saved_for_backward() as saved, context:
            y = call_directly(lora_mlp, values)[0]
        wide = [t for t in saved if t.shape == (*y.shape[:-1], values["up_weight"].shape[0])]
        found.append((wide, y, *(torch.autograd.grad(y.sin().sum(), wanted, retain_graph=True) for _ in range(2))))
    (kept, *plain), (spared, *results) = found
    assert (len(kept), len(spared)) == (2, 0)
    torch.testing.assert_close(results, plain, rtol=0, atol=0)


def test_gate_and_up_are_saved_when_x_is_not() -> None:
    values = complete(lora_mlp, arguments(f32, 7, 4, inner=11, rank=3))
    values["down_lora_b"].requires_grad_()
    values["x"].requires_grad_()
    with saved_for_backward() as saved, recomputing():
        y = call_directly(lora_mlp, values)[0]
    assert sum(t.shape == (7, 11) for t in saved) == 2
    y.sum().backward()
