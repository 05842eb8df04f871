"""Shims that TorchDynamo traces in place of PEFT's functions that it cannot trace, while a region runs compiled.

Each of these functions would break the graph of a region:
- For DoRA, PEFT looks up the package of the class of a layer's weight, which TorchDynamo does not support.
- A transposed weight is wrapped in a new parameter.
- Each step of DoRA clears a cache that is already empty, which is a side effect in a checkpointed region.
- An adapter on a parameter, such as the weights of all experts, registers a parametrization for the call, which changes
  the class of the layer.

A shim returns the same as the function for plain tensors and parameters, and for DoRA also for 4-bit weights of
bitsandbytes; for anything else it calls the function. No function is replaced: while a region runs compiled, the
function has the attribute that tells TorchDynamo what to trace instead. A function that does not return what is
expected, such as in another release, has no shim.
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

FunctionAndShim = tuple[FunctionType, Callable[..., Any] | None]

_lock = threading.Lock()
_active_blocks = 0
_shimmed: list[FunctionType] = []
_cache: dict[tuple[str, str, Any, bool], FunctionAndShim] = {}


@contextmanager
def use_peft_shims() -> Iterator[None]:
    """Make TorchDynamo trace the shims inside the block, in all threads."""
    global _active_blocks
    with _lock:
        _active_blocks += 1
        if _active_blocks == 1:
            _set_shims()
    try:
        yield
    finally:
        with _lock:
            _active_blocks -= 1
            while _active_blocks == 0 and _shimmed:
                delattr(_shimmed.pop(), INLINE_ATTRIBUTE)


def _set_shims() -> None:
    has_bitsandbytes = "bitsandbytes" in sys.modules  # if it is imported later, the shims are made again
    for entry in _SHIMS:
        found = _cache.get((*entry, has_bitsandbytes))
        if found is None:
            found = _find(*entry)
            if found is None:
                continue
            _cache[(*entry, has_bitsandbytes)] = found
        function, shim = found
        if shim is not None and not hasattr(function, INLINE_ATTRIBUTE):
            setattr(function, INLINE_ATTRIBUTE, shim)
            _shimmed.append(function)


def _find(module: str, path: str, make: Callable[[FunctionType], Any]) -> FunctionAndShim | None:
    """Return a function with its shim, or without one if it does not behave as expected; None if its module is not
    imported."""
    function: Any = sys.modules.get(module)
    for name in path.split("."):
        function = getattr(function, name, None)
    if type(function) is not FunctionType:
        return None
    try:
        return function, make(function)
    except Exception:  # for example, it takes other arguments
        return function, None


def _without_shim(function: FunctionType) -> Callable[..., Any]:
    """Return a copy of a function without the attribute, as tracing the function itself would trace the shim."""
    parts = function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    copied = FunctionType(*parts)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def _shim_dequantize(function: FunctionType) -> Callable[..., Any] | None:
    """Return a function that returns the weight of a layer, the same object if it is not quantized."""
    plain = torch.zeros(1), nn.Parameter(torch.zeros(1))
    if any(function(SimpleNamespace(weight=weight)) is not weight for weight in plain):
        return None
    original, (params_4bit, dequantize) = _without_shim(function), _bitsandbytes_4bit(function)

    def is_packed(state: Any) -> bool:
        """Return whether a weight is packed for bitsandbytes' CPU kernel, or not quantized yet."""
        return state is None or getattr(state, "packing_format_for_cpu", False)

    def dequantize_weight(module: Any) -> Any:
        if not hasattr(module, "W_q"):
            if type(module.weight) in _PLAIN:
                return module.weight
            if type(module.weight) is params_4bit and not is_packed(module.weight.quant_state):
                return dequantize(module.weight.detach(), module.weight.quant_state)
        return original(module)

    return dequantize_weight


def _bitsandbytes_4bit(function: FunctionType) -> tuple[Any, Callable[..., Any]]:
    """Return the class of bitsandbytes' 4-bit weights and the function that dequantizes them; None for the class if
    PEFT's function returns something else."""
    bnb: Any = sys.modules.get("bitsandbytes")
    if bnb is None:
        return None, function
    try:
        weight = bnb.nn.Params4bit(torch.ones(1, 64, dtype=torch.float32, device="cpu"), requires_grad=False).to("cpu")
        dequantized = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        is_equal = torch.equal(function(SimpleNamespace(weight=weight)), dequantized)
    except Exception:  # in releases without CPU kernels
        is_equal = False
    return (bnb.nn.Params4bit if is_equal else None), bnb.functional.dequantize_4bit


def _shim_transpose(function: FunctionType) -> Callable[..., Any] | None:
    """Return a function that transposes a weight if `fan_in_fan_out`. PEFT wraps the transpose of a parameter in a new
    parameter, so the first one gets no gradient."""
    weight = nn.Parameter(torch.zeros(2, 1))
    transposed = function(weight, True)
    if function(weight, False) is not weight or transposed.grad_fn is not None:
        return None
    if transposed.data_ptr() != weight.data_ptr() or transposed.shape != (1, 2) or transposed.stride() != (1, 1):
        return None
    original = _without_shim(function)

    def transpose(weight: Any, fan_in_fan_out: Any) -> Any:
        if fan_in_fan_out and isinstance(weight, nn.Parameter):
            return weight.T.detach()
        return original(weight, fan_in_fan_out)

    return transpose


def _shim_cache_clear(function: FunctionType) -> Callable[..., Any] | None:
    """Return a function that clears DoRA's cache, but does not write to the layer if it is empty, as in training:
    checkpointed regions must have no side effects."""
    layer = SimpleNamespace(_dora_cache={"key": 1})
    if function(layer) is not None or vars(layer) != {"_dora_cache": {}}:
        return None
    original = _without_shim(function)

    def cache_clear(self: Any) -> None:
        if self._dora_cache:
            original(self)

    return cache_clear


def _shim_param_wrapper(function: FunctionType) -> Callable[..., Any] | None:
    """Return a function that runs a layer with an adapter on one of its parameters, passing the sum of the parameter
    and the adapter by `functional_call`."""
    original = _without_shim(function)

    def forward(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        adapters = [name for name in self.active_adapters if name in self.lora_A]
        layer = self.get_base_layer()
        weight = getattr(layer, self.parameter_name)
        is_plain = type(weight) is nn.Parameter and weight.dtype in _FLOATS
        supported = adapters and is_plain and "adapter_names" not in kwargs
        if not supported or self.disable_adapters or self.merged or hasattr(layer, "parametrizations"):
            return original(self, x, *args, **kwargs)
        if len(adapters) > 1 or self.num_experts == 1:
            first, *others = map(self.get_delta_weight, adapters)
            total = weight + sum(others, first)
        else:
            left, right, scaling = self.get_delta_factors(adapters[0])
            with torch.autocast(weight.device.type, enabled=False):
                total = torch.baddbmm(weight, left, right, alpha=scaling)
        path, inner = self.parameter_name, self.base_layer
        while inner is not layer:  # other parameters of the layer have adapters as well
            path, inner = "base_layer." + path, inner.base_layer
        return functional_call(self.base_layer, {path: total}, (x, *args), kwargs, tie_weights=False)

    with torch.random.fork_rng([]), torch.device("cpu"), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for experts in (1, 2):
            runs = [_run_on_experts(experts, function.__globals__, run) for run in (function, forward)]
            if not all(map(torch.equal, *runs)):
                return None
    return forward


class _Experts(nn.Module):
    """A mixture of experts with two layers each, to compare a shim with PEFT's function on."""

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
    ("peft.utils.integrations", "dequantize_module_weight", _shim_dequantize),
    ("peft.utils.other", "transpose", _shim_transpose),
    ("peft.tuners.lora.dora", "DoraLinearLayer._cache_clear", _shim_cache_clear),
    ("peft.tuners.lora.layer", "ParamWrapper.forward", _shim_param_wrapper),
)
"""The module and the path of each function, and a function that returns its shim, or None."""
