"""The accuracy check that a case must pass before it is timed.

The op and its eager reference are compared with the reference in float64. The error of a tensor is the root mean square
of its difference from float64, relative to the root mean square of the float64 tensor. An op passes if for each output
and each gradient

    error(op) <= 1.25 * error(eager) + eps / 2

where eps is that of the tensor's dtype, so that eps / 2 is one rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastlora.tools.bench.cases import Arguments, Case

RATIO = 1.25
MAX_ELEMENTS = 1 << 31
"""Cases with a larger output, or with more logits, are not checked: float64 takes 8 bytes per element."""


@dataclass(frozen=True)
class Accuracy:
    """Relative errors of one output or gradient against float64.

    Attributes:
        tensor: the name of the output or gradient.
        error, eager_error: errors of the op and of its eager reference.
        rounding: half of eps.
    """

    case: Case
    dtype: torch.dtype
    tensor: str
    error: float
    eager_error: float
    rounding: float

    @property
    def passes(self) -> bool:
        return self.error <= RATIO * self.eager_error + self.rounding


def flat(value: Any) -> list[torch.Tensor]:
    """Return the tensors of a nested sequence."""
    return [value] if isinstance(value, torch.Tensor) else [t for v in value for t in flat(v)]


def expand_lists(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values with each list replaced by its members, named `name[0]`, `name[1]` and so on."""
    named: dict[str, Any] = {}
    for name, value in values.items():
        named |= {f"{name}[{i}]": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
    return named


def leaves(arguments: Arguments) -> dict[str, torch.Tensor]:
    """Return the tensors that require gradients, by name."""
    return {n: t for n, t in expand_lists(arguments).items() if isinstance(t, torch.Tensor) and t.requires_grad}


def cotangents(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return random incoming gradients, generated on the outputs' device because they may be large."""
    generator = torch.Generator(outputs[0].device).manual_seed(1)
    return [torch.randn(t.shape, generator=generator, device=t.device).to(t.dtype) for t in outputs]


def results(function: Callable[..., Any], arguments: Arguments, like: list[torch.Tensor] | None = None) -> Arguments:
    """Return outputs and gradients by name. The incoming gradients are random and rounded to the dtypes of `like`, by
    default the outputs."""
    outputs = flat(function(**arguments))
    grads = [g.to(t.dtype) for g, t in zip(cotangents(like or outputs), outputs, strict=True)]
    inputs = leaves(arguments)
    found = torch.autograd.grad(outputs, list(inputs.values()), grads) if inputs else ()
    named = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    return named | {f"gradient of {n}": g for n, g in zip(inputs, found, strict=True)}


def in_float64(arguments: Arguments) -> Arguments:
    """Return the arguments with tensors converted to float64, and dtypes replaced by it."""
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
    """Return the errors of every output and gradient of a case."""
    arguments = case.arguments(dtype, device)
    ours = results(case.op, arguments)
    outputs = [t for name, t in ours.items() if name.startswith("output")]
    eager = results(case.op.reference, arguments)
    reference = results(case.op.reference, in_float64(arguments), like=outputs)
    return [
        Accuracy(
            case,
            dtype,
            name,
            _error(ours[name], expected),
            _error(eager[name], expected),
            torch.finfo(ours[name].dtype).eps / 2,
        )
        for name, expected in reference.items()
    ]


def _error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the relative error. It is nan if the value has a nan, and then fails the check."""
    size = reference.square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
    return ((value.double() - reference).square().mean().sqrt() / size).item()


def fits_in_float64(case: Case) -> bool:
    """Return whether there is enough memory for the float64 reference."""
    sizes = case.sizes
    return case.tokens * max(sizes.get(name, 1) for name in ("H", "I", "N", "K", "V")) <= MAX_ELEMENTS
