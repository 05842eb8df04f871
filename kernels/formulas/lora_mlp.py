"""The gated MLP with LoRA on its three layers:  y = down(act(gate(x)) * up(x)).

    g = gate(x)    u = up(x)                   `lora_linear` each, in proj_dtype
    h = (act(g) * u).to(hidden_dtype)          `glu`
    y = down(h)                                `lora_linear`, in out_dtype

The formulas and the roundings are those of `lora_linear.py` and `glu.py`; this op saves fewer activations.

Backward, with dh, dg and du the gradients of h, g and u:

    dh = dy Wd + dxa_d Ad          dg, du from dh by the gated unit
    dx = dg Wg + dxa_g Ag + du Wu + dxa_u Au          as one chain of products

and the gradients of parameters are those of `lora_linear`.  dh is only computed if a gradient before `down` is needed.

Saved: g, u, s xa of each layer (rows of R, those of gate and up concatenated), and x if a W or an A of gate or up is
trained.  h, as large as g and u, is recomputed from these.  If x is saved, g and u, by far the largest, can be
recomputed instead, which costs their two products.

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
    """Return the arguments of one of the three layers, by their names in `lora_linear`."""
    return {name: values[f"{projection}_{name}"] for name in names}


def wanted_of(projection: str, wanted: Wanted) -> Wanted:
    """Return which gradients of one layer's parameters are wanted, by their names in `lora_linear`."""
    return of(projection, wanted, single.PARAMETERS)


def gradients_of(projection: str, gradients: Gradients) -> Gradients:
    """Return the gradients of one layer's parameters by their names in this op, from those in `lora_linear`."""
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
    """Compute the MLP as models and PEFT do. Return y in `out_dtype`."""

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

    def layer_backward(projection: str, needs_z: bool, dy: torch.Tensor, z: torch.Tensor | None) -> list[Addend]:
        layer = of(projection, saved, (*_TYPES, "xa"))
        of_layer, dz = single.projection_backward(
            wanted_of(projection, wanted), needs_z, dy, z, base_dtype=base_dtype, lora_dtype=lora_dtype, **layer
        )
        gradients.update(gradients_of(projection, of_layer))
        return dz

    needs = {p: wanted["x"] or any(wanted_of(p, wanted).values()) for p in INNER}
    hidden = None
    if wanted["down_weight"] or wanted["down_lora_a"]:
        (hidden,) = glu.forward(gate, up, activation, hidden_dtype)
    dhidden = layer_backward("down", any(needs.values()), grads[0], hidden)
    if not dhidden:
        return gradients
    dh = sum_products(dhidden, hidden_dtype).reshape(gate.shape)
    inner = glu.backward(needs, [dh], gate, up, activation)
    addends = [a for p in INNER if needs[p] for a in layer_backward(p, wanted["x"], inner[p], x)]
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
