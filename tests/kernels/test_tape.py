"""Forms play from a tape what they did before, and nothing that they did not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_checks import complete, evaluate, f32, on_device
from test_lora_group import CASES as GROUPS
from test_lora_linear import CASES as LAYERS
from test_lora_mlp import CASES as MLPS
from test_rms_norm import CASES as NORMS

FORMS = ["triton"]


@pytest.mark.parametrize("case", [*LAYERS, *GROUPS, *MLPS, *NORMS], ids=str)
def test_what_is_played_has_the_bits_of_what_the_form_does(case: Any) -> None:
    from fastlora.kernels.triton.host import trace_cache

    torch.manual_seed(0)
    given = {name: on_device(value) for name, value in complete(case.op, case.arguments(f32)).items()}
    with trace_cache.stopped():
        expected = evaluate(case.op, given).values()
    for _ in range(3):
        found = evaluate(case.op, given).values()
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
            assert found[name].stride() == value.stride(), name


class Calls:
    """A form that counts its calls: y = scale x + bias, and each of the parts plus one."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None, scale: float, parts: list[Any]) -> Any:
        self.calls += 1
        y = torch.empty_like(x)
        torch.mul(x, scale, out=y)
        z = y.t().contiguous().t()
        if bias is not None:
            z += bias
        return {"y": z, "parts": [None if p is None else p + 1 for p in parts]}


def play(form: Any, **changed: Any) -> Any:
    given = {"x": torch.randn(4, 6), "bias": None, "scale": 2.0, "parts": [None, torch.zeros(3)]} | changed
    expected = Calls()(**given)
    found = form(**given)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def taped() -> tuple[Calls, Any]:
    from fastlora.kernels.triton.host.trace_cache import taped as wrap

    form = Calls()
    form.__name__ = "form"  # type: ignore[attr-defined]
    return form, wrap(form)


def test_a_form_is_recorded_in_its_second_call_and_then_not_called_again() -> None:
    form, run = taped()
    for _ in range(6):
        play(run)
    assert form.calls == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.randn(6, 4).t()},
        {"x": torch.randn(4, 7)},
        {"x": torch.randn(4, 6).double()},
        {"x": torch.randn(25)[1:].view(4, 6)},
        {"bias": torch.randn(6)},
        {"scale": 3.0},
        {"scale": 2},
        {"parts": [torch.zeros(3), None]},
        {"parts": [None, torch.zeros(3), None]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_calls_that_differ_have_tapes_of_their_own(changed: dict[str, Any]) -> None:
    form, run = taped()
    for _ in range(3):
        play(run)
        play(run, **changed)
    assert form.calls == 4


def test_one_tensor_twice_is_not_two() -> None:
    form, run = taped()
    same = torch.randn(6, 6)
    for _ in range(3):
        play(run, x=same, parts=[same])
        play(run, x=torch.randn(6, 6), parts=[torch.randn(6, 6)])
    assert form.calls == 4


def test_nothing_is_kept_of_what_was_recorded() -> None:
    import gc
    import weakref

    form, run = taped()
    x = torch.randn(4, 6)
    result = [run(x=x, bias=None, scale=2.0, parts=[]) for _ in range(3)]
    alive = [weakref.ref(x), *(weakref.ref(each["y"]) for each in result)]
    del x, result
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    assert form.calls == 2


@pytest.mark.parametrize("how", ["asks a tensor", "reads another", "leaves nothing"])
def test_what_no_tape_can_play_is_always_called(how: str) -> None:
    from fastlora.kernels.triton.host.trace_cache import taped as wrap

    outside, calls = torch.zeros(()), []

    def form(x: torch.Tensor) -> Any:
        calls.append(x)
        if how == "asks a tensor":
            return x * float(x.sum())
        if how == "reads another":
            return x + outside
        return torch.tensor([1.0, 2.0]) + x

    run = wrap(form)
    for i in range(4):
        outside.fill_(i)
        x = torch.full((2,), float(i))
        expected = {"asks a tensor": x * x.sum(), "reads another": x + i}.get(how, torch.tensor([1.0, 2.0]) + x)
        assert torch.equal(run(x=x), expected)
    assert len(calls) == 4
