"""The gated MLP with adapters on its three layers:  y = down(act(gate(x)) * up(x)).

    g = gate(x)    u = up(x)                   `lora_linear` each, in proj_dtype
    h = (act(g) * u).to(hidden_dtype)          `glu`
    y = down(h)                                `lora_linear`, in out_dtype

The formulas and the roundings are those of `lora_linear.py` and `glu.py`; this op exists for what it need not keep.

Backward, with dh, dg and du the gradients of h, g and u:

    dh = dy Wd + dxa_d Ad          dg, du from dh by the gated unit
    dx = dg Wg + dxa_g Ag + du Wu + dxa_u Au          as one chain of products

and each layer's parameters as if it stood alone.  dh is only computed if something before `down` wants it.

Saved: x, g, u, and s xa of each layer (rows of R, those of gate and up side by side).  h, as wide as g and u, is
recomputed from them.  x only if a W or an A of gate or up is trained; and then g and u, by far the largest, can be
spared at the price of their two products.

Shapes: x (..., H), Wg and Wu (I, H), Wd (H', I), y (..., H').  Source: Shazeer, "GLU Variants Improve Transformer"
(2020), with the adapters of Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.kernels.core.cost import Cost, Work
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.library import register_op
from fastlora.kernels.core.numerics import Addend, sum_products
from fastlora.kernels.core.semantic_op import Policy
from fastlora.kernels.formulas import glu
from fastlora.kernels.formulas import lora_linear as single

_TYPES = {
    "weight": "Tensor",
    "bias": "Tensor?",
    "lora_a": "Tensor",
    "lora_b": "Tensor",
    "lora_bias": "Tensor?",
    "scaling": "float",
}
INNER = ("gate", "up")
PROJECTIONS = (*INNER, "down")
_PARAMETERS = ", ".join(f"{kind} {p}_{name}" for p in PROJECTIONS for name, kind in _TYPES.items())


def of(projection: str, values: dict[str, Any], names: tuple[str, ...] = tuple(_TYPES)) -> dict[str, Any]:
    """The values of one of the three layers, under the names that `lora_linear` knows them by."""
    return {name: values[f"{projection}_{name}"] for name in names}


def wants_of(projection: str, wanted: Wanted) -> Wanted:
    """Which gradients are wanted of one of the three layers' parameters."""
    return of(projection, wanted, single.PARAMETERS)


def gradients_of(projection: str, gradients: Gradients) -> Gradients:
    """The gradients of one of the three layers' parameters, under the names that this op knows them by."""
    return {f"{projection}_{name}": gradient for name, gradient in gradients.items()}


def reference(
    x: torch.Tensor,
    activation: str,
    base_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    proj_dtype: torch.dtype,
    hidden_dtype: torch.dtype,
    out_dtype: torch.dtype,
    **parameters: Any,
) -> torch.Tensor:
    """The MLP as the models and PEFT write it. Returns y in `out_dtype`."""

    def project(projection: str, z: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        layer = of(projection, parameters)
        return single.reference(z, None, **layer, base_dtype=base_dtype, lora_dtype=lora_dtype, out_dtype=dtype)

    gate, up = project("gate", x, proj_dtype), project("up", x, proj_dtype)
    return project("down", glu.reference(gate, up, activation, hidden_dtype), out_dtype)


def forward(
    x: torch.Tensor,
    activation: str,
    base_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    proj_dtype: torch.dtype,
    hidden_dtype: torch.dtype,
    out_dtype: torch.dtype,
    **parameters: Any,
) -> tuple[torch.Tensor, ...]:
    def project(projection: str, z: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        layer = of(projection, parameters)
        return single.forward(z, None, **layer, base_dtype=base_dtype, lora_dtype=lora_dtype, out_dtype=dtype)

    gate, gate_xa = project("gate", x, proj_dtype)
    up, up_xa = project("up", x, proj_dtype)
    (hidden,) = glu.forward(gate, up, activation, hidden_dtype)
    y, down_xa = project("down", hidden, out_dtype)
    return y, gate, up, torch.cat((gate_xa, up_xa), dim=1), down_xa


def backward(
    wanted: Wanted,
    grads: list[torch.Tensor],
    x: torch.Tensor | None,
    gate: torch.Tensor,
    up: torch.Tensor,
    inner_xa: torch.Tensor,
    x_dtype: torch.dtype,
    activation: str,
    base_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    hidden_dtype: torch.dtype,
    **saved: Any,
) -> Gradients:
    gradients: Gradients = {}
    ranks = [len(saved[f"{p}_lora_a"]) for p in INNER]
    saved["gate_xa"], saved["up_xa"] = inner_xa.split(ranks, dim=1)

    def through(projection: str, wants_z: bool, dy: torch.Tensor, z: torch.Tensor | None) -> list[Addend]:
        layer = of(projection, saved, (*_TYPES, "xa"))
        found, dz = single.projection_backward(
            wants_of(projection, wanted), wants_z, dy, z, base_dtype=base_dtype, lora_dtype=lora_dtype, **layer
        )
        gradients.update(gradients_of(projection, found))
        return dz

    wants = {p: wanted["x"] or any(wants_of(p, wanted).values()) for p in INNER}
    hidden = None
    if wanted["down_weight"] or wanted["down_lora_a"]:
        (hidden,) = glu.forward(gate, up, activation, hidden_dtype)
    dhidden = through("down", any(wants.values()), grads[0], hidden)
    if not dhidden:
        return gradients
    dh = sum_products(dhidden, hidden_dtype).reshape(gate.shape)
    inner = glu.backward(wants, [dh], gate, up, activation)
    addends = [a for p in INNER if wants[p] for a in through(p, wanted["x"], inner[p], x)]
    if wanted["x"]:
        gradients["x"] = sum_products(addends, x_dtype).reshape(*gate.shape[:-1], saved["gate_weight"].shape[1])
    return gradients


lora_mlp = register_op(
    "lora_mlp",
    family="lora",
    schema=(
        f"(Tensor x, {_PARAMETERS}, str activation, ScalarType base_dtype, ScalarType lora_dtype, "
        "ScalarType proj_dtype, ScalarType hidden_dtype, ScalarType out_dtype) "
        "-> (Tensor y, Tensor gate, Tensor up, Tensor inner_xa, Tensor down_xa)"
    ),
    outputs=1,
    reference=reference,
    forward=forward,
    backward=backward,
    traceable=True,
    saves=(
        "x",
        *(f"{p}_{name}" for p in PROJECTIONS for name in single.PARAMETERS),
        *("gate", "up", "inner_xa", "down_xa"),
    ),
    saved_if={"x": lambda wanted, _: any(wanted[f"{p}_{name}"] for p in INNER for name in ("weight", "lora_a"))},
    policy=Policy(
        may_overwrite_saved=True,
        recomputable=INNER,
        reads_quantized=tuple(f"{p}_weight" for p in PROJECTIONS),
        outputs_mutable=True,
    ),
    choices={"activation": tuple(glu.ACTIVATIONS)},
    cost=Cost(
        forward=Work(flops="6*T*H*I + 6*T*R*(H + I)", bytes="(2*T*H + 2*T*I + 3*T*R)*b + 3*H*I*w + 3*R*(H + I)*p"),
        backward=Work(flops="6*T*H*I + 12*T*R*(H + I)", bytes="(3*T*H + 2*T*I + 3*T*R)*b + 3*H*I*w + 6*R*(H + I)*p"),
    ),
)
