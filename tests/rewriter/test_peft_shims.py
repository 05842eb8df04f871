"""TorchDynamo traces shims in place of PEFT functions that it cannot trace, only while a region runs compiled."""

from __future__ import annotations

import sys
import threading
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import transpose
from quantized_models import Format
from torch import Tensor, nn

from fastlora.frontend import peft_shims
from fastlora.frontend.peft_shims import use_peft_shims

FUNCTIONS = (dequantize_module_weight, transpose, DoraLinearLayer._cache_clear, ParamWrapper.forward)
INLINE_ATTRIBUTE = "_torchdynamo_inline"


def have_shims() -> list[bool]:
    return [hasattr(function, INLINE_ATTRIBUTE) for function in FUNCTIONS]


def shim_of(function: Any) -> Any:
    with use_peft_shims():
        return getattr(function, INLINE_ATTRIBUTE)


def test_shims_are_set_only_inside_the_block() -> None:
    before = [dict(vars(function)) for function in FUNCTIONS]
    with use_peft_shims():
        with use_peft_shims():
            assert all(have_shims())
        assert all(have_shims())
    with pytest.raises(ValueError, match="from inside"), use_peft_shims():
        raise ValueError("from inside")
    assert [dict(vars(function)) for function in FUNCTIONS] == before


def test_the_last_thread_removes_the_shims() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def stay() -> None:
        with use_peft_shims():
            entered.set()
            go_on.wait()

    thread = threading.Thread(target=stay)
    thread.start()
    entered.wait()
    with use_peft_shims():
        pass
    assert all(have_shims())
    go_on.set()
    thread.join()
    assert not any(have_shims())


def test_an_existing_inline_attribute_is_kept() -> None:
    def own(module: Any) -> Any:
        return module.weight

    dequantize_module_weight._torchdynamo_inline = own
    try:
        with use_peft_shims():
            assert dequantize_module_weight._torchdynamo_inline is own
        assert dequantize_module_weight._torchdynamo_inline is own
    finally:
        del dequantize_module_weight._torchdynamo_inline


class Quantized(nn.Parameter):
    __module__ = "torchao.somewhere"

    def dequantize(self) -> Any:  # type: ignore[override]
        return self.data * 3


def test_only_plain_weights_bypass_the_original_function() -> None:
    dequantize = shim_of(dequantize_module_weight)
    for weight in (nn.Parameter(torch.ones(2)), torch.ones(2)):
        assert dequantize(SimpleNamespace(weight=weight)) is weight
    quantized = SimpleNamespace(weight=Quantized(torch.ones(2)))
    assert torch.equal(dequantize(quantized), torch.full((2,), 3.0))
    other = SimpleNamespace(W_q=1, weight=torch.ones(2), dequantize=lambda: "dequantized")
    assert dequantize(other) == "dequantized"
    with pytest.raises(TypeError, match=r"nn\.Parameter"):
        dequantize(SimpleNamespace(weight=1))


def test_a_4_bit_weight_is_dequantized_on_its_device() -> None:
    layer = Format().layer(nn.Linear(64, 8))
    weight = layer.weight
    decoded = shim_of(dequantize_module_weight)(layer)
    assert layer.weight is weight
    assert torch.equal(decoded, dequantize_module_weight(layer))


def test_a_packed_weight_is_passed_to_the_original_function() -> None:
    def counted(module: Any) -> Any:
        calls.append(module)
        return (
            module.weight if getattr(module.weight, "quant_state", None) is None else dequantize_module_weight(module)
        )

    calls: list[Any] = []
    layer = Format().layer(nn.Linear(64, 8))
    dequantize = peft_shims._shim_dequantize(counted)  # type: ignore[arg-type]
    assert dequantize is not None
    calls.clear()
    dequantize(layer)
    assert calls == []
    layer.weight.quant_state.packing_format_for_cpu = True  # type: ignore[union-attr]
    dequantize(layer)
    assert calls == [layer]


def test_another_dequantization_disables_the_4_bit_shim(monkeypatch: pytest.MonkeyPatch) -> None:
    def halved(module: Any) -> Any:
        weight = dequantize_module_weight(module)
        return weight if type(weight) in (torch.Tensor, nn.Parameter) and weight is module.weight else weight / 2

    layer = Format().layer(nn.Linear(64, 8))
    dequantize = peft_shims._shim_dequantize(halved)  # type: ignore[arg-type]
    assert dequantize is not None
    assert torch.equal(dequantize(layer), halved(layer))


def test_a_nonempty_cache_is_cleared() -> None:
    for kept in ({}, {"weight-norm": 1}):
        layer = SimpleNamespace(_dora_cache=dict(kept))
        shim_of(DoraLinearLayer._cache_clear)(layer)
        assert layer._dora_cache == {}


def test_the_transpose_shim_returns_no_parameter() -> None:
    transpose_shim = shim_of(transpose)
    tensor, parameter = torch.randn(2, 3, requires_grad=True), nn.Parameter(torch.randn(2, 3))
    assert transpose_shim(tensor, False) is tensor
    assert transpose_shim(parameter, False) is parameter
    assert transpose_shim(tensor, True).grad_fn is not None
    for turned in (transpose_shim(parameter, True), transpose(parameter, True)):
        assert torch.equal(turned, parameter.T)
        assert turned.grad_fn is None
    assert transpose_shim(parameter, fan_in_fan_out=True).data_ptr() == parameter.data_ptr()


def wrapped(experts: int = 2, dtype: torch.dtype = torch.float32, second: bool = False) -> ParamWrapper:
    """Return a layer with adapters on both of its parameters; the last one may have two."""
    torch.manual_seed(0)
    layer = Experts(experts).to(dtype)
    options: dict[str, Any] = {"config": LoraConfig(init_lora_weights=False), "r": 2, "lora_alpha": 4}
    inner = ParamWrapper(layer, "default", parameter_name="up", **options)
    outer = ParamWrapper(inner, "default", parameter_name="down", **options)
    if second:
        outer.update_layer("second", **options)
        outer.set_adapter(["default", "second"])
    return outer


class Experts(nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(experts, 3, 5)), nn.Parameter(torch.randn(experts, 5, 3))

    def forward(self, x: Tensor, power: float = 1.0) -> Tensor:
        return torch.bmm(torch.bmm(x, self.down).tanh() * power, self.up)


def evaluated(run: Any, wrapper: ParamWrapper) -> list[Tensor]:
    x = torch.randn(len(wrapper.get_base_layer().up), 4, 5, generator=torch.Generator().manual_seed(1))
    parameters = dict(sorted(wrapper.named_parameters()))
    result = run(wrapper, x.to(parameters["base_layer.base_layer.up"].dtype), power=0.5)
    wanted = [p for p in parameters.values() if p.requires_grad]
    gradients = torch.autograd.grad(result.float().square().sum(), wanted, allow_unused=True)
    return [result, *(g for g in gradients if g is not None)]


def merged(wrapper: ParamWrapper) -> None:
    wrapper.merge()


def disabled(wrapper: ParamWrapper) -> None:
    wrapper.enable_adapters(False)


def trained(wrapper: ParamWrapper) -> None:
    wrapper.get_base_layer().requires_grad_()


def nothing(wrapper: ParamWrapper) -> None:
    pass


@pytest.mark.parametrize("prepare", [nothing, merged, disabled, trained], ids=lambda f: f.__name__)
@pytest.mark.parametrize("options", [{}, {"second": True}, {"experts": 1}, {"dtype": torch.bfloat16}], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_the_parameter_shim_is_bit_identical(autocast: bool, options: Any, prepare: Any) -> None:
    found = []
    for run in (ParamWrapper.forward, shim_of(ParamWrapper.forward)):
        wrapper = wrapped(**options)
        prepare(wrapper)
        wrapper.get_base_layer().up.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(evaluated(run, wrapper))
    assert all(map(torch.equal, *found))
    assert len(found[0]) == len(found[1]) > 1


@pytest.mark.parametrize("second", [False, True], ids=["one adapter", "two adapters"])
def test_an_adapted_parameter_is_traced_as_one_graph(second: bool) -> None:
    wrapper = wrapped(second=second)
    expected = evaluated(ParamWrapper.forward, wrapper)
    before = {name: id(p) for name, p in wrapper.named_parameters()}
    torch._dynamo.reset()
    compiled = torch.compile(lambda *given, **more: wrapper(*given, **more), backend="eager", fullgraph=True)
    with use_peft_shims():
        found = evaluated(lambda _, *given, **more: compiled(*given, **more), wrapper)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, its)
    assert {name: id(p) for name, p in wrapper.named_parameters()} == before
    assert type(wrapper.get_base_layer()) is Experts


def test_making_shims_does_not_change_random_states() -> None:
    peft_shims._cache.clear()
    before = torch.get_rng_state()
    shim_of(ParamWrapper.forward)
    assert torch.equal(torch.get_rng_state(), before)


def copied(module: Any) -> Any:
    return module.weight.clone()


def with_more(module: Any, dtype: Any) -> Any:
    return module.weight


def kept(weight: Any, fan_in_fan_out: bool) -> Any:
    """Return a parameter that gets a gradient."""
    return weight.T if fan_in_fan_out else weight


@pytest.mark.parametrize("function", [copied, with_more, kept], ids=lambda f: f.__name__)
def test_a_changed_function_has_no_shim(function: FunctionType, monkeypatch: pytest.MonkeyPatch) -> None:
    known = peft_shims._SHIMS
    made = [(function.__module__, function.__name__, make) for _, _, make in known]
    monkeypatch.setitem(sys.modules, function.__module__, SimpleNamespace(**{function.__name__: function}))
    monkeypatch.setattr(peft_shims, "_SHIMS", tuple(made))
    with use_peft_shims():
        assert not hasattr(function, INLINE_ATTRIBUTE)


def test_missing_libraries_are_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft_shims, "_SHIMS", (("no_such_library.utils", "weight_of", peft_shims._shim_dequantize),))
    with use_peft_shims():
        assert not any(have_shims())
