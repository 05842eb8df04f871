"""How far an op is from the truth, beside eager: the gate that a case passes before it is timed.

The truth is the op's reference in float64. The error of a tensor is the root mean square of its elements' errors over
that of the truth; an op passes where each output and each gradient has

    err(op) <= 1.25 * err(eager) + eps / 2

with eager the reference in the case's dtype, and eps that of the tensor's own dtype: half of it is one rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastlora.tools.bench.cases import Arguments, Case

RATIO = 1.25
LARGEST = 1 << 31
"""The truth is computed for so many elements of an output or of logits at most; it takes 8 bytes for each."""


@dataclass(frozen=True)
class Accuracy:
    """Errors of one output or gradient, relative to the truth."""

    case: Case
    dtype: torch.dtype
    tensor: str
    error: float
    eager: float
    floor: float

    @property
    def passes(self) -> bool:
        return self.error <= RATIO * self.eager + self.floor


def flat(value: Any) -> list[torch.Tensor]:
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in flat(v)]


def labelled(values: dict[str, Any]) -> dict[str, Any]:
    """The values with every list's members by themselves, as `name[0]`, `name[1]`, ..."""
    named: dict[str, Any] = {}
    for name, value in values.items():
        named |= {f"{name}[{i}]": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
    return named


def leaves(arguments: Arguments) -> dict[str, torch.Tensor]:
    """The tensors whose gradients are wanted, by name."""
    return {n: t for n, t in labelled(arguments).items() if isinstance(t, torch.Tensor) and t.requires_grad}


def cotangents(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Random incoming gradients, drawn where the outputs are, which may be large."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [torch.randn(t.shape, generator=generator, device=t.device).to(t.dtype) for t in outputs]


def results(function: Callable[..., Any], arguments: Arguments, like: list[torch.Tensor] | None = None) -> Arguments:
    """Outputs and gradients by name; the incoming gradients are random in the dtypes of `like`, or of the outputs."""
    outputs = flat(function(**arguments))
    grads = [g.to(t.dtype) for g, t in zip(cotangents(like or outputs), outputs, strict=True)]
    wanted = leaves(arguments)
    found = torch.autograd.grad(outputs, list(wanted.values()), grads) if wanted else ()
    named = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    return named | {f"gradient of {n}": g for n, g in zip(wanted, found, strict=True)}


def in_float64(arguments: Arguments) -> Arguments:
    """The same numbers and the same computation, with every dtype in it float64."""
    return {name: _in_float64(value) for name, value in arguments.items()}


def _in_float64(value: Any) -> Any:
    if isinstance(value, list):
        return [_in_float64(v) for v in value]
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def accuracy(case: Case, dtype: torch.dtype, device: torch.device) -> list[Accuracy]:
    """The errors of every output and gradient of a case."""
    arguments = case.arguments(dtype, device)
    mine = results(case.op, arguments)
    outputs = [t for name, t in mine.items() if name.startswith("output")]
    eager = results(case.op.reference, arguments)
    truth = results(case.op.reference, in_float64(arguments), like=outputs)
    return [
        Accuracy(
            case,
            dtype,
            name,
            _error(mine[name], true),
            _error(eager[name], true),
            torch.finfo(mine[name].dtype).eps / 2,
        )
        for name, true in truth.items()
    ]


def _error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """nan where the value has one, so that it fails."""
    size = truth.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return ((value.double() - truth).square().mean().sqrt() / size).item()


def affordable(case: Case) -> bool:
    """Whether there is memory for the truth."""
    sizes = case.sizes
    return case.tokens * max(sizes.get(name, 1) for name in ("H", "I", "N", "K", "V")) <= LARGEST
