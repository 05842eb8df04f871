"""Functions of others that TorchDynamo cannot trace, and what it traces in their place while a region runs compiled.

Two that PEFT has for DoRA would cut a region in pieces. Before it hands out a layer's weight it asks from which package
the weight's class comes, and TorchDynamo has no answer to that for a plain parameter. And a weight that lies the other
way round it wraps as a parameter of its own, which nobody else ever sees. A stand-in gives for plain tensors and
parameters what the function itself gives, and hands anything else to that function.

Nothing is replaced: who calls the function gets the function. TorchDynamo alone looks for the attribute that
`torch.compile` sets on what it returns, to say what to trace in its place; it is on the function only while some region
runs compiled. A function that does not give what is known of it, as another release's might not, is left alone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FunctionType, SimpleNamespace
from typing import Any

import torch
from torch import nn

_INLINE = "_torchdynamo_inline"
_PLAIN = (torch.Tensor, nn.Parameter)

_lock = threading.Lock()
_inside = 0
_marked: list[FunctionType] = []


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
                delattr(_marked.pop(), _INLINE)


def _mark() -> None:
    for module, name, make in _STAND_INS:
        function = getattr(sys.modules.get(module), name, None)
        if type(function) is FunctionType and not hasattr(function, _INLINE):
            stand_in = _made(make, function)
            if stand_in is not None:
                setattr(function, _INLINE, stand_in)
                _marked.append(function)


@cache
def _made(make: Callable[[FunctionType], Any], function: FunctionType) -> Callable[..., Any] | None:
    try:
        return make(function)
    except Exception:  # it takes something else
        return None


def _unmarked(function: FunctionType) -> Callable[..., Any]:
    """The same function without the attribute, or tracing it would trace the stand-in."""
    parts = function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    same = FunctionType(*parts)
    same.__kwdefaults__ = function.__kwdefaults__
    return same


def _weight_of(function: FunctionType) -> Callable[..., Any] | None:
    """From a layer to its weight, which is the same object where it is not quantised."""
    plain = torch.zeros(1), nn.Parameter(torch.zeros(1))
    if any(function(SimpleNamespace(weight=weight)) is not weight for weight in plain):
        return None
    original = _unmarked(function)

    def weight_of(module: Any) -> Any:
        if not hasattr(module, "W_q") and type(module.weight) in _PLAIN:
            return module.weight
        return original(module)

    return weight_of


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
        if fan_in_fan_out and type(weight) is nn.Parameter:
            return weight.T.detach()
        return original(weight, fan_in_fan_out)

    return transposed_if


_STAND_INS = (
    ("peft.utils.integrations", "dequantize_module_weight", _weight_of),
    ("peft.utils.other", "transpose", _transposed_if),
)
"""Where the functions are, and what makes the stand-in of each, or None."""
