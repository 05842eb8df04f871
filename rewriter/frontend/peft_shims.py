"""Functions of others that TorchDynamo cannot trace, and what it traces in their place while a region runs compiled.

Some that PEFT has would cut a region in pieces. Before it hands out a layer's weight, for DoRA, it asks from which
package the weight's class comes, and TorchDynamo has no answer to that for a plain parameter. A weight that lies the
other way round it wraps as a parameter of its own, which nobody else ever sees. In every step of DoRA's it empties a
cache that is empty, which a checkpoint takes for a change outside of it. And an adapter on a parameter, such as
the weights of all experts, is a parametrisation that it registers for the call, which gives the layer another class. A
stand-in gives for plain tensors and parameters what the function itself gives, for DoRA also for 4-bit weights of
bitsandbytes, and hands anything else to that function.

Nothing is replaced: who calls the function gets the function. TorchDynamo alone looks for the attribute that
`torch.compile` sets on what it returns, to say what to trace in its place; it is on the function only while some region
runs compiled. A function that does not give what is known of it, as another release's might not, is left alone.
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
    """While it is entered, by any thread, TorchDynamo traces stand-ins for what it could not trace."""
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
    quantises = "bitsandbytes" in sys.modules  # which may be imported later, and then there is more to know
    for entry in _STAND_INS:
        found = _known.get((*entry, quantises))
        if found is None:
            found = _find(*entry)
            if found is None:
                continue
            _known[(*entry, quantises)] = found
        function, stand_in = found
        if stand_in is not None and not hasattr(function, INLINE_ATTRIBUTE):
            setattr(function, INLINE_ATTRIBUTE, stand_in)
            _marked.append(function)


def _find(module: str, path: str, make: Callable[[FunctionType], Any]) -> Known | None:
    """The function, and its stand-in unless it is another than is known; None where there is none so far."""
    function: Any = sys.modules.get(module)
    for name in path.split("."):
        function = getattr(function, name, None)
    if type(function) is not FunctionType:
        return None
    try:
        return function, make(function)
    except Exception:  # it takes something else
        return function, None


def _unmarked(function: FunctionType) -> Callable[..., Any]:
    """The same function without the attribute, or tracing it would trace the stand-in."""
    parts = function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    same = FunctionType(*parts)
    same.__kwdefaults__ = function.__kwdefaults__
    return same


def _weight_of(function: FunctionType) -> Callable[..., Any] | None:
    """From a layer to its weight, which is the same object where it is not quantised, and decoded where it is."""
    plain = torch.zeros(1), nn.Parameter(torch.zeros(1))
    if any(function(SimpleNamespace(weight=weight)) is not weight for weight in plain):
        return None
    original, (kept, decode) = _unmarked(function), _four_bits(function)

    def is_packed(state: Any) -> bool:
        """In another order, that of bitsandbytes' kernel for evaluation on a CPU; or there is no state yet."""
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
    """The class of bitsandbytes' 4-bit weights, and what decodes them, if the function gives that; on a CPU it makes
    another parameter of the weight as well, and gives the layer that."""
    bnb: Any = sys.modules.get("bitsandbytes")
    if bnb is None:
        return None, function
    try:
        weight = bnb.nn.Params4bit(torch.ones(1, 64, dtype=torch.float32, device="cpu"), requires_grad=False).to("cpu")
        decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        known = torch.equal(function(SimpleNamespace(weight=weight)), decoded)
    except Exception:  # as releases do that have nothing for CPUs
        known = False
    return (bnb.nn.Params4bit if known else None), bnb.functional.dequantize_4bit


def _transposed_if(function: FunctionType) -> Callable[..., Any] | None:
    """From a weight to the weight or its transpose; a parameter's is a parameter of its own, so nothing leads back."""
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
    """The emptying of DoRA's cache, which has nothing in it in training: inside a checkpoint nothing of a layer's may
    be written to."""
    layer = SimpleNamespace(_dora_cache={"key": 1})
    if function(layer) is not None or vars(layer) != {"_dora_cache": {}}:
        return None
    original = _unmarked(function)

    def emptied(self: Any) -> None:
        if self._dora_cache:
            original(self)

    return emptied


def _on_a_parameter(function: FunctionType) -> Callable[..., Any] | None:
    """The forward of a layer, of whose parameters one carries an adapter: the layer runs on that parameter's sum."""
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
    """Two layers for each of some experts."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(experts, 3, 5)), nn.Parameter(torch.randn(experts, 5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.bmm(torch.bmm(x, self.down).tanh(), self.up)


def _run_on_experts(experts: int, peft: dict[str, Any], forward: Callable[..., Any]) -> list[torch.Tensor]:
    """Results and gradients, with one adapter on both parameters of a layer, and with another one on its last."""
    torch.default_generator.manual_seed(0)  # that of the CPU alone
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


_STAND_INS = (
    ("peft.utils.integrations", "dequantize_module_weight", _weight_of),
    ("peft.utils.other", "transpose", _transposed_if),
    ("peft.tuners.lora.dora", "DoraLinearLayer._cache_clear", _emptied),
    ("peft.tuners.lora.layer", "ParamWrapper.forward", _on_a_parameter),
)
"""Where the functions are, and what makes the stand-in of each, or None."""
