"""Gated linear unit:  y = act(gate) * up, with act one of silu, gelu (erf) and gelu_tanh.

    silu        act(z) = z s                     act'(z) = s (1 + z (1 - s))                      s = sigmoid(z)
    gelu        act(z) = z P                     act'(z) = P + z p
    gelu_tanh   act(z) = z (1 + t) / 2           act'(z) = (1 + t) / 2 + z (1 - t^2) u' / 2

where P = (1 + erf(z / sqrt(2))) / 2 and p = exp(-z^2 / 2) / sqrt(2 pi) are the normal distribution and its density, and
t = tanh(u) with u = sqrt(2 / pi) (z + 0.044715 z^3), so u' = sqrt(2 / pi) (1 + 3 * 0.044715 z^2).

Backward:

    dgate = dy * up * act'(gate)        dup = dy * act(gate)

Saved: gate and up.  act(gate) is recomputed.  Half precision is computed in float32 and rounded once, where eager
rounds after the activation as well.

Shapes: gate, up and y (..., I); y and dgate have the strides of gate, dup those of up.
Sources: Shazeer, "GLU Variants Improve Transformer" (2020); Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.kernels.core.cost import Cost, Work
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.implementations import with_strides_of
from fastlora.kernels.core.library import register_op

_CUBIC = 0.044715


def _silu_slope(z: torch.Tensor) -> torch.Tensor:
    s = torch.sigmoid(z)
    return s * (1 + z * (1 - s))


def _gelu_slope(z: torch.Tensor) -> torch.Tensor:
    distribution = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
    density = torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))
    return distribution + z * density


def _gelu_tanh(z: torch.Tensor) -> torch.Tensor:
    return F.gelu(z, approximate="tanh")


def _gelu_tanh_slope(z: torch.Tensor) -> torch.Tensor:
    slope = math.sqrt(2 / math.pi)
    square = z * z
    t = torch.tanh(slope * (z + _CUBIC * z * square))
    return 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * slope * (1 + 3 * _CUBIC * square)


Elementwise = Callable[[torch.Tensor], torch.Tensor]
ACTIVATIONS: dict[str, tuple[Elementwise, Elementwise]] = {
    "silu": (F.silu, _silu_slope),
    "gelu": (F.gelu, _gelu_slope),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope),
}
"""act and act' by name, both in the dtype of their argument."""


def activate(z: torch.Tensor, activation: str) -> torch.Tensor:
    """Return act(z), in z's dtype."""
    return _known(activation)[0](z)


def derivative(z: torch.Tensor, activation: str) -> torch.Tensor:
    """Return act'(z), in z's dtype."""
    return _known(activation)[1](z)


def _known(activation: str) -> tuple[Elementwise, Elementwise]:
    if activation not in ACTIVATIONS:
        raise ValueError(f"glu: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")
    return ACTIVATIONS[activation]


def reference(gate: torch.Tensor, up: torch.Tensor, activation: str, out_dtype: torch.dtype) -> torch.Tensor:
    """Compute the gated unit as models do. Return y in `out_dtype`."""
    return (activate(gate, activation) * up).to(out_dtype)


def _wide(gate: torch.Tensor, up: torch.Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(gate.dtype, up.dtype), torch.float32)


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str, out_dtype: torch.dtype) -> tuple[torch.Tensor]:
    wide = _wide(gate, up)
    return (with_strides_of((activate(gate.to(wide), activation) * up.to(wide)).to(out_dtype), gate),)


def backward(
    wanted: Wanted, grads: list[torch.Tensor], gate: torch.Tensor, up: torch.Tensor, activation: str, **_: Any
) -> Gradients:
    wide = _wide(gate, up)
    z, dy = gate.to(wide), grads[0].to(wide)
    gradients: Gradients = {}
    if wanted["gate"]:
        gradients["gate"] = with_strides_of((dy * up.to(wide) * derivative(z, activation)).to(gate.dtype), gate)
    if wanted["up"]:
        gradients["up"] = with_strides_of((dy * activate(z, activation)).to(up.dtype), up)
    return gradients


glu = register_op(
    "glu",
    family="glu",
    schema="(Tensor gate, Tensor up, str activation, ScalarType out_dtype) -> (Tensor y)",
    outputs=1,
    reference=reference,
    forward=forward,
    backward=backward,
    traceable=True,
    saves=("gate", "up"),
    choices={"activation": tuple(ACTIVATIONS)},
    cost=Cost(
        forward=Work(flops="6*T*I", bytes="3*T*I*b"),
        backward=Work(flops="12*T*I", bytes="5*T*I*b"),
    ),
)
