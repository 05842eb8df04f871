"""Functions of PEFT that TorchDynamo cannot trace, and what it traces in their place while a region runs compiled.

Each would break the graph of a region:
- For DoRA, PEFT asks from which package the class of a layer's weight comes, which TorchDynamo cannot answer.
- A transposed weight is wrapped as a new parameter.
- Each step of DoRA clears a cache that is empty already, which a checkpoint takes for a side effect.
- An adapter on a parameter, such as the weights of all experts, registers a parametrization for the call, which changes
  the class of the layer.

A shim returns what the function returns for plain tensors and parameters, and for DoRA also for 4-bit weights of
bitsandbytes; it calls the function for anything else. Nothing is replaced: the function has the attribute that tells
TorchDynamo what to trace in its place, only while a region runs compiled. A function that does not return what is
expected, in another release say, has no shim.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from fastlora.compat.dynamo import INLINE_ATTRIBUTE

_PLAIN = (torch.Tensor, nn.Parameter)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Known = tuple[FunctionType, Callable[..., Any] | None]

_lock = threading.Lock()
_inside = 0
_marked: list[FunctionType] = []
_known: dict[tuple[str, str, Any, bool], Known] = {}


@contextmanager
def traceable() -> Iterator[None]:
    """Have TorchDynamo trace the shims inside of the block, in all threads."""
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            _mark()
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            while _inside == 0 and _marked:
                delattr(_marked.pop(), INLINE_ATTRIBUTE)


def _mark() -> None:
    quantises = "bitsandbytes" in sys.modules  # which may be imported later, and then 4-bit weights count
    for entry in _SHIMS:
        found = _known.get((*entry, quantises))
        if found is None:
            found = _find(*entry)
            if found is None:
                continue
            _known[(*entry, quantises)] = found
        function, shim = found
        if shim is not None and not hasattr(function, INLINE_ATTRIBUTE):
            setattr(function, INLINE_ATTRIBUTE, shim)
            _marked.append(function)


def _find(module: str, path: str, make: Callable[[FunctionType], Any]) -> Known | None:
    """Return the function and its shim, if it behaves as expected; None if its module is not imported."""
    function: Any = sys.modules.get(module)
    for name in path.split("."):
        function = getattr(function, name, None)
    if type(function) is not FunctionType:
        return None
    try:
        return function, make(function)
    except Exception:  # it takes other arguments
        return function, None


def _unmarked(function: FunctionType) -> Callable[..., Any]:
    """Return the same function without the attribute: tracing the function would trace the shim."""
    parts = function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    same = FunctionType(*parts)
    same.__kwdefaults__ = function.__kwdefaults__
    return same


def _weight_of(function: FunctionType) -> Callable[..., Any] | None:
    """Return a layer's weight: the same object if it is not quantized, dequantized if it is."""
    plain = torch.zeros(1), nn.Parameter(torch.zeros(1))
    if any(function(SimpleNamespace(weight=weight)) is not weight for weight in plain):
        return None
    original, (kept, decode) = _unmarked(function), _four_bits(function)

    def is_packed(state: Any) -> bool:
        """Whether a weight is packed for bitsandbytes' CPU kernel, or not quantized yet."""
        return state is None or getattr(state, "packing_format_for_cpu", False)

    def weight_of(module: Any) -> Any:
        if not hasattr(module, "W_q"):
            if type(module.weight) in _PLAIN:
                return module.weight
            if type(module.weight) is kept and not is_packed(module.weight.quant_state):
                return decode(module.weight.detach(), module.weight.quant_state)
        return original(module)

    return weight_of


def _four_bits(function: FunctionType) -> tuple[Any, Callable[..., Any]]:
    """Return the class of bitsandbytes' 4-bit weights and what dequantizes them, if the function does the same."""
    bnb: Any = sys.modules.get("bitsandbytes")
    if bnb is None:
        return None, function
    try:
        weight = bnb.nn.Params4bit(torch.ones(1, 64, dtype=torch.float32, device="cpu"), requires_grad=False).to("cpu")
        decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        known = torch.equal(function(SimpleNamespace(weight=weight)), decoded)
    except Exception:  # in releases without CPU kernels
        known = False
    return (bnb.nn.Params4bit if known else None), bnb.functional.dequantize_4bit


def _transposed_if(function: FunctionType) -> Callable[..., Any] | None:
    """Return a weight or its transpose. That of a parameter is a new parameter, without a gradient for the first."""
    weight = nn.Parameter(torch.zeros(2, 1))
    turned = function(weight, True)
    if function(weight, False) is not weight or turned.grad_fn is not None or turned.data_ptr() != weight.data_ptr():
        return None
    if turned.shape != (1, 2) or turned.stride() != (1, 1):
        return None
    original = _unmarked(function)

    def transposed_if(weight: Any, fan_in_fan_out: Any) -> Any:
        if fan_in_fan_out and isinstance(weight, nn.Parameter):
            return weight.T.detach()
        return original(weight, fan_in_fan_out)

    return transposed_if


def _emptied(function: FunctionType) -> Callable[..., Any] | None:
    """Clear DoRA's cache, which is empty in training, without writing to the layer: a checkpoint may not."""
    layer = SimpleNamespace(_dora_cache={"key": 1})
    if function(layer) is not None or vars(layer) != {"_dora_cache": {}}:
        return None
    original = _unmarked(function)

    def emptied(self: Any) -> None:
        if self._dora_cache:
            original(self)

    return emptied


def _on_a_parameter(function: FunctionType) -> Callable[..., Any] | None:
    """Run a layer with an adapter on one of its parameters, on the sum of that parameter and the adapter."""
    original = _unmarked(function)

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        layer = self.get_base_layer()
        weight = getattr(layer, self.parameter_name)
        known = adapters and type(weight) is nn.Parameter and weight.dtype in _FLOATS and "adapter_names" not in kwargs
        if not known or self.disable_adapters or self.merged or hasattr(layer, "parametrizations"):
            return original(self, x, *args, **kwargs)
        if len(adapters) > 1 or self.num_experts == 1:
            first, *others = map(self.get_delta_weight, adapters)
            total = weight + sum(others, first)
        else:
            left, right, scaling = self.get_delta_factors(adapters[0])
            with torch.autocast(weight.device.type, enabled=False):
                total = torch.baddbmm(weight, left, right, alpha=scaling)
        path, inner = self.parameter_name, self.base_layer
        while inner is not layer:  # wrapped for another parameter as well
            path, inner = "base_layer." + path, inner.base_layer
        return functional_call(self.base_layer, {path: total}, (x, *args), kwargs, tie_weights=False)

    with torch.random.fork_rng([]), torch.device("cpu"), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for experts in (1, 2):
            runs = [_run_on_experts(experts, function.__globals__, run) for run in (function, forward)]
            if not all(map(torch.equal, *runs)):
                return None
    return forward


class _Experts(nn.Module):
    """Experts with two layers each."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(experts, 3, 5)), nn.Parameter(torch.randn(experts, 5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.bmm(x, self.down).tanh(), self.up)


def _run_on_experts(experts: int, peft: dict[str, Any], forward: Callable[..., Any]) -> list[torch.Tensor]:
    """Return results and gradients with one adapter on both parameters of a layer, and with two on the last."""
    torch.default_generator.manual_seed(0)  # the CPU's generator alone
    config = peft["LoraConfig"](r=1, lora_alpha=2, init_lora_weights=False)
    options = {"config": config, "r": 1, "lora_alpha": 2}
    inner = peft["ParamWrapper"](_Experts(experts), "default", parameter_name="up", **options)
    outer = peft["ParamWrapper"](inner, "default", parameter_name="down", **options)
    found = []
    for adapters in (["default"], ["default", "second"]):
        if len(adapters) > 1:
            outer.update_layer(adapters[-1], **options)
        outer.set_adapter(adapters)
        parameters = dict(outer.named_parameters())
        given = [torch.randn(experts, 4, 5, requires_grad=True), *(parameters[name] for name in sorted(parameters))]
        found.append(forward(outer, given[0]))
        found += torch.autograd.grad(found[-1].square().sum(), given)
    return found


_SHIMS = (
    ("peft.utils.integrations", "dequantize_module_weight", _weight_of),
    ("peft.utils.other", "transpose", _transposed_if),
    ("peft.tuners.lora.dora", "DoraLinearLayer._cache_clear", _emptied),
    ("peft.tuners.lora.layer", "ParamWrapper.forward", _on_a_parameter),
)
"""Where the functions are, and what returns the shim of each, or None."""
