"""Arguments to test ops with, and outputs and gradients of an op or its reference."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastlora.kernels.core.call_site import call_site
from fastlora.kernels.core.implementations import restricted
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.tools.bench.accuracy import expand_lists, flat
from fastlora.tools.bench.cases import Arguments

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(value: Any) -> Any:
    """Move a tensor, or a list of them, to the device under test, with its strides; return other values as they are."""
    if isinstance(value, list):
        return [on_device(v) for v in value]
    if not isinstance(value, torch.Tensor) or value.device.type == DEVICE.type:
        return value
    extent = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True)) + 1
    memory = value.as_strided((extent if value.numel() else 0,), (1,)).to(DEVICE)
    return memory.as_strided(value.shape, value.stride(), 0)


def native() -> torch.dtype:
    """Return the widest dtype that the implementation under test supports."""
    return f32 if restricted.to == "triton" else f64


class Case:
    """An op with a way to make arguments for it in some dtype: `build(dtype, *args, **kwargs)`."""

    def __init__(self, name: str, op: SemanticOp, build: Callable[..., Arguments], *args: Any, **kwargs: Any) -> None:
        self.name, self.op = name, op
        self._build = lambda dtype: build(dtype, *args, **kwargs)

    def arguments(self, dtype: torch.dtype | None = None) -> Arguments:
        torch.manual_seed(0)
        return complete(self.op, self._build(dtype or native()))

    def kind(self) -> Hashable:
        """Return the properties of the arguments that the dispatcher depends on, and attributes that are not
        numbers."""
        given = self._build(f32)
        return self.op.name, *(_kind(value) for value in self.op.order(given))

    def __str__(self) -> str:
        return self.name


def _kind(value: Any) -> Hashable:
    if isinstance(value, list):
        return tuple(map(_kind, value))
    if isinstance(value, torch.Tensor):
        return value.dim(), value.dtype
    return type(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def complete(op: SemanticOp, arguments: Arguments) -> Arguments:
    """Return the arguments with omitted ones added, on the device under test."""
    return {a.name: on_device(v) for a, v in zip(op.arguments, op.order(arguments), strict=False)}


def call_directly(op: SemanticOp, arguments: Arguments) -> Any:
    """Call an op through a call site, as eager graphs do; return its outputs."""
    site, given = call_site(op, op.order(arguments)[: len(op.names)])
    return site(*given)


def leaves(arguments: Arguments) -> dict[str, torch.Tensor]:
    """Return the floating-point tensors by name."""
    return {n: t for n, t in expand_lists(arguments).items() if isinstance(t, torch.Tensor) and t.is_floating_point()}


def require_every_gradient(arguments: Arguments) -> None:
    for t in leaves(arguments).values():
        t.requires_grad_()


def replaced(arguments: Arguments, new: dict[str, torch.Tensor]) -> Arguments:
    """Return the arguments with some of their leaves replaced."""
    result = {n: list(v) if isinstance(v, list) else v for n, v in arguments.items()}
    for label, tensor in new.items():
        name, _, index = label.removesuffix("]").partition("[")
        if index:
            result[name][int(index)] = tensor
        else:
            result[name] = tensor
    return result


# ---- running an op, or its reference


@dataclass
class Result:
    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]

    def gradient(self, name: str) -> torch.Tensor:
        found = self.gradients[name]
        assert found is not None, f"no gradient of {name}"
        return found

    def values(self) -> dict[str, torch.Tensor]:
        """Return outputs and gradients by name, for comparisons."""
        outputs = {f"output {i}": t for i, t in enumerate(self.outputs)}
        return outputs | {f"gradient of {n}": g for n, g in self.gradients.items() if g is not None}


def cotangents(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return random incoming gradients in float64, the same on every device."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, dtype=f64, generator=generator).to(t.dtype).to(t.device) for t in outputs]


def evaluate(
    function: Callable[..., Any],
    arguments: Arguments,
    wanted: Collection[str] | None = None,
    grads: list[torch.Tensor] | None = None,
) -> Result:
    """Return outputs, and the gradients of the wanted leaves (by default all) for the given or random cotangents."""
    arguments = {n: on_device(v) for n, v in arguments.items()}
    fresh = {n: t.detach().requires_grad_(wanted is None or n in wanted) for n, t in leaves(arguments).items()}
    outputs = flat(function(**replaced(arguments, fresh)))
    grads = cotangents(outputs) if grads is None else grads
    inputs = {n: t for n, t in fresh.items() if t.requires_grad}
    gradients: dict[str, torch.Tensor | None] = dict.fromkeys(fresh)
    reached = [(t, g) for t, g in zip(outputs, grads, strict=True) if t.requires_grad]
    if inputs:
        tensors, incoming = zip(*reached, strict=True)
        found = torch.autograd.grad(tensors, tuple(inputs.values()), incoming, allow_unused=True)
        gradients |= dict(zip(inputs, found, strict=True))
    return Result([t.detach() for t in outputs], gradients)
