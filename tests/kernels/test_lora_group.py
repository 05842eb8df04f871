"""LoRA layers with a shared input: the contract, rounding errors, unused and frozen members."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import SCHEMES, Scheme, layer, layers, scheme_of, schemes
from op_cases import Arguments, Case, complete, evaluate, f32, f64, leaves, replaced
from op_contract import assert_same_but_for_rounding, contract
from op_precision import assert_as_precise, assert_precise_on_average, assert_propagates, sizes, tensors
from op_spies import backward_calls

from fastlora.kernels.ops import lora_group, lora_linear
from fastlora.tools.bench.accuracy import flat

IMPLEMENTATIONS = ["pytorch", "triton"]


def together(members: list[dict[str, Any]]) -> Arguments:
    return {name: [member[name] for member in members] for name in members[0]}


def arguments(
    dtype: Scheme | torch.dtype,
    *x: int,
    shapes: tuple[tuple[int, int], ...],
    biases: bool = True,
    p: tuple[float | None, ...] = (),
) -> Arguments:
    """Return members of the given (N, rank) with a shared x, each with its own dropout if p is given."""
    scheme = scheme_of(dtype)
    return {
        "x": torch.randn(x, dtype=f64).to(scheme.x),
        **together([layer(scheme, n, x[-1], rank, biases) for n, rank in shapes]),
        **scheme.attributes(),
        **seeded(*p),
    }


def seeded(*p: float | None) -> Arguments:
    if not p:
        return {}
    return {"seed": [None if each is None else torch.tensor([i]) for i, each in enumerate(p)], "dropout": list(p)}


CASES = [
    Case("q, k, v", lora_group, arguments, 2, 3, 4, shapes=((4, 2), (2, 1), (2, 1)), biases=False),
    Case("gate, up with biases", lora_group, arguments, 3, 4, shapes=((3, 2), (3, 2))),
    Case("one member", lora_group, arguments, 3, 4, shapes=((3, 2),)),
    Case("seeds", lora_group, arguments, 2, 3, 4, shapes=((4, 2), (2, 1)), biases=False, p=(0.3, 0.5)),
    Case("some with seeds", lora_group, arguments, 3, 4, shapes=((3, 2), (3, 1), (2, 1)), p=(None, 0.5, None)),
]


@contract(CASES)
def test_contract(case: Case, check: Any) -> None:
    check(case)


@given(st.data())
def test_errors_are_at_most_those_of_eager(data: st.DataObject) -> None:
    scheme = data.draw(schemes())
    k, tokens = data.draw(sizes), data.draw(sizes)
    members = [
        data.draw(layers(scheme, data.draw(sizes), k, data.draw(sizes))) for _ in range(data.draw(st.integers(1, 3)))
    ]
    x = data.draw(tensors((tokens, k), scheme.x))
    p = data.draw(st.lists(st.sampled_from([None, 0.1, 0.5]), min_size=len(members), max_size=len(members)))
    drawn = {"x": x, **together(members), **scheme.attributes(), **seeded(*p)}
    assert_as_precise(lora_group, complete(lora_group, drawn))


@pytest.mark.parametrize("p", [(), (0.1, 0.1, 0.1)], ids=["", "seeds"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_errors_on_average(scheme: Scheme, p: tuple[float, ...]) -> None:
    torch.manual_seed(0)
    given_ = complete(lora_group, arguments(scheme, 96, 64, shapes=((64, 8), (32, 8), (32, 4)), p=p))
    assert_precise_on_average(lora_group, given_)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_infs_and_nans_propagate(case: Case) -> None:
    assert_propagates(lora_group, case.arguments(f32))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("p", [(), (0.4, 0.4), (None, 0.4)], ids=str)
def test_members_equal_lora_linear(scheme: Scheme, p: tuple[float | None, ...]) -> None:
    torch.manual_seed(0)
    group = complete(lora_group, arguments(scheme, 5, 8, shapes=((6, 2), (4, 3)), p=p))
    for i, y in enumerate(lora_group(**group)):
        member = {name: value[i] if isinstance(value, list) else value for name, value in group.items()}
        assert_same_but_for_rounding(y, lora_linear(**member), f"member {i}")


@pytest.mark.parametrize("case", [CASES[0], CASES[4]], ids=str)
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_members_without_an_incoming_gradient_are_skipped(used: tuple[int, ...], case: Case) -> None:
    """As in eager, their parameters get no gradient, and none is computed."""
    given_ = case.arguments()
    gradients = []
    for function in (lora_group, lora_group.reference):
        inputs = {n: t.detach().requires_grad_() for n, t in leaves(given_).items()}
        with backward_calls(lora_group) as calls:
            outputs = flat(function(**replaced(given_, inputs)))
            loss = torch.stack([outputs[i].square().sum() for i in used]).sum()
            found = torch.autograd.grad(loss, tuple(inputs.values()), allow_unused=True)
        gradients.append(dict(zip(inputs, found, strict=True)))
        for grads, needs, *_ in calls:
            assert [g is not None for g in grads] == [i in used for i in range(3)]
            assert sum(needs) == sum(g is not None for g in found)
    mine, expected = gradients
    assert {n for n, g in mine.items() if g is None} == {n for n, g in expected.items() if g is None}
    torch.testing.assert_close(mine, expected)


def test_the_list_of_biases_is_optional() -> None:
    given_ = CASES[0].arguments()
    short = {n: v for n, v in given_.items() if n not in ("bias", "lora_bias")}
    for y, expected in zip(lora_group(**short), lora_group(**given_), strict=True):
        assert torch.equal(y, expected)


def test_a_frozen_member_gets_no_gradients() -> None:
    """While another member is trained."""
    given_ = CASES[0].arguments()
    wanted = [n for n in leaves(given_) if n.endswith("[1]")]
    result = evaluate(lora_group, given_, wanted)
    assert {n for n, g in result.gradients.items() if g is not None} == set(wanted)
