"""TorchDynamo traces stand-ins for functions that it cannot trace, while a region runs compiled and never else."""

from __future__ import annotations

import sys
import threading
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from torch import nn

from fastlora import standins
from fastlora.standins import traceable

FUNCTIONS = (dequantize_module_weight, transpose)
MARK = "_torchdynamo_inline"


def marked() -> list[bool]:
    return [hasattr(function, MARK) for function in FUNCTIONS]


def stand_in(function: Any) -> Any:
    with traceable():
        return getattr(function, MARK)


def test_functions_are_marked_inside_only() -> None:
    before = [dict(vars(function)) for function in FUNCTIONS]
    with traceable():
        with traceable():
            assert marked() == [True, True]
        assert marked() == [True, True]
    with pytest.raises(ValueError, match="from inside"), traceable():
        raise ValueError("from inside")
    assert [dict(vars(function)) for function in FUNCTIONS] == before


def test_the_last_thread_takes_the_marks_away() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def stay() -> None:
        with traceable():
            entered.set()
            go_on.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    entered.wait()
    with traceable():
        pass
    assert marked() == [True, True]
    go_on.set()
    thread.join()
    assert marked() == [False, False]


def test_a_function_that_is_marked_already_keeps_its_mark() -> None:
    def own(module: Any) -> Any:
        return module.weight

    dequantize_module_weight._torchdynamo_inline = own
    try:
        with traceable():
            assert dequantize_module_weight._torchdynamo_inline is own
        assert dequantize_module_weight._torchdynamo_inline is own
    finally:
        del dequantize_module_weight._torchdynamo_inline


class Quantised(nn.Parameter):
    __module__ = "torchao.somewhere"

    def dequantize(self) -> Any:  # type: ignore[override]
        return self.data * 3


def test_plain_weights_are_handed_out_and_all_others_are_the_functions_business() -> None:
    weight_of = stand_in(dequantize_module_weight)
    for weight in (nn.Parameter(torch.ones(2)), torch.ones(2)):
        assert weight_of(SimpleNamespace(weight=weight)) is weight
    quantised = SimpleNamespace(weight=Quantised(torch.ones(2)))
    assert torch.equal(weight_of(quantised), torch.full((2,), 3.0))
    other = SimpleNamespace(W_q=1, weight=torch.ones(2), dequantize=lambda: "dequantised")
    assert weight_of(other) == "dequantised"
    with pytest.raises(TypeError, match=r"nn\.Parameter"):
        weight_of(SimpleNamespace(weight=1))


def test_a_transpose_is_what_it_was_but_for_a_parameter_that_nobody_sees() -> None:
    transposed_if = stand_in(transpose)
    tensor, parameter = torch.randn(2, 3, requires_grad=True), nn.Parameter(torch.randn(2, 3))
    assert transposed_if(tensor, False) is tensor
    assert transposed_if(parameter, False) is parameter
    assert transposed_if(tensor, True).grad_fn is not None
    for turned in (transposed_if(parameter, True), transpose(parameter, True)):
        assert torch.equal(turned, parameter.T)
        assert turned.grad_fn is None
    assert transposed_if(parameter, fan_in_fan_out=True).data_ptr() == parameter.data_ptr()


def copied(module: Any) -> Any:
    return module.weight.clone()


def with_more(module: Any, dtype: Any) -> Any:
    return module.weight


def kept(weight: Any, fan_in_fan_out: bool) -> Any:
    """Whose gradient finds its way back."""
    return weight.T if fan_in_fan_out else weight


@pytest.mark.parametrize("function", [copied, with_more, kept], ids=lambda f: f.__name__)
def test_a_function_that_does_something_else_is_left_alone(
    function: FunctionType, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = standins._STAND_INS
    made = [(function.__module__, function.__name__, make) for _, _, make in known]
    monkeypatch.setitem(sys.modules, function.__module__, SimpleNamespace(**{function.__name__: function}))
    monkeypatch.setattr(standins, "_STAND_INS", tuple(made))
    with traceable():
        assert not hasattr(function, MARK)


def test_libraries_that_are_not_there_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standins, "_STAND_INS", (("no_such_library.utils", "weight_of", standins._weight_of),))
    with traceable():
        assert marked() == [False, False]
