"""The gated MLP with adapters: `kernels/lora_mlp.py` has the formulas, `lora_linear.py` the products.

The gated unit's backward makes dgate, dup and, for down's dA, the hidden activation, in one pass.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.kernels import lora_linear as single
from fastlora.kernels import lora_mlp as op
from fastlora.kernels.forms import Form
from fastlora.kernels.gpu import glu, lora_group, low_rank
from fastlora.kernels.gpu import lora_linear as layer
from fastlora.kernels.gpu.launch import FLOATS, allocate
from fastlora.kernels.op import Gradients, Wanted

_INNER = ("gate", "up")
_ALL = (*single.PARAMETERS, "scaling")


def _of(projection: str, values: dict[str, Any], names: tuple[str, ...] = _ALL) -> dict[str, Any]:
    """The values of one of the three layers, under the names that `lora_linear` knows them by."""
    return {name: values[f"{projection}_{name}"] for name in names}


def serves(x: torch.Tensor | None, activation: str, **given: Any) -> bool:
    base, inner = given["base_dtype"], (given["proj_dtype"], given["hidden_dtype"])
    dtypes = {name: given[name] for name in ("base_dtype", "lora_dtype", "out_dtype")}
    weights = (given[f"{p}_weight"] for p in (*_INNER, "down"))
    return activation in glu.ACTIVATIONS and set(inner) == {base} and all(layer.serves(x, w, **dtypes) for w in weights)


def forward(
    x: torch.Tensor, activation: str, base_dtype: torch.dtype, out_dtype: torch.dtype, **given: Any
) -> tuple[torch.Tensor, ...]:
    tokens = single.rows(x).to(base_dtype)
    inner = [_of(p, given) for p in _INNER]
    adapters = [member.pop("lora_a") for member in inner]
    inner_xa = lora_group.down(tokens, adapters, [member["scaling"] for member in inner])
    parts = inner_xa.split([len(a) for a in adapters], dim=1)
    gate, up = (
        layer.project(tokens, part, out_dtype=base_dtype, **member) for part, member in zip(parts, inner, strict=True)
    )
    hidden = allocate(tuple(gate.shape), base_dtype, gate.device)
    glu.run_forward(gate, up, activation, hidden)
    down = _of("down", given)
    down_xa = low_rank.down(hidden, [down.pop("lora_a")], down["scaling"])
    y = layer.project(hidden, down_xa, out_dtype=out_dtype, **down)
    shape = x.shape[:-1]
    return y.view(*shape, y.shape[1]), gate.view(*shape, gate.shape[1]), up.view(*shape, up.shape[1]), inner_xa, down_xa


def serves_backward(grads: list[torch.Tensor], x: torch.Tensor | None, **given: Any) -> bool:
    return serves(x, **given) and grads[0].numel() > 0 and given["base_dtype"] in FLOATS


def backward(
    wanted: Wanted,
    grads: list[torch.Tensor],
    x: torch.Tensor | None,
    gate: torch.Tensor,
    up: torch.Tensor,
    inner_xa: torch.Tensor,
    down_xa: torch.Tensor,
    x_dtype: torch.dtype,
    activation: str,
    base_dtype: torch.dtype,
    **given: Any,
) -> Gradients:
    shape = (*gate.shape[:-1], given["gate_weight"].shape[1])
    dy, gate, up = (single.rows(t) for t in (grads[0].to(base_dtype), gate, up))
    wants = {p: _of(p, wanted, single.PARAMETERS) for p in (*_INNER, "down")}
    inward = {p: wanted["x"] or any(wants[p].values()) for p in _INNER}
    keeps = wanted["down_weight"] or wanted["down_lora_a"]

    down = _of("down", given)
    down_a = down.pop("lora_a")
    hidden = None
    dxa: torch.Tensor | None
    if wanted["down_weight"]:  # rare, so that the product may wait for it
        hidden = allocate(tuple(gate.shape), base_dtype, gate.device)
        glu.run_forward(gate, up, activation, hidden)
    found, dxa = layer.parameter_gradients(
        wants["down"], wanted["down_lora_a"] or any(inward.values()), dy, hidden, down_xa, **down
    )
    inner: list[torch.Tensor | None] = [None, None]
    if any(inward.values()):
        assert dxa is not None
        dhidden = layer.total((dxa, down_a.to(base_dtype)), [(dy, down["weight"].to(base_dtype))], None, base_dtype)
        *inner, made = glu.backward_with_hidden(
            inward, dhidden, gate, up, activation, base_dtype if keeps and hidden is None else None
        )
        hidden = made if made is not None else hidden
    elif keeps and hidden is None:
        hidden = allocate(tuple(gate.shape), base_dtype, gate.device)
        glu.run_forward(gate, up, activation, hidden)
    if wanted["down_lora_a"]:
        assert dxa is not None
        assert hidden is not None
        found["lora_a"] = low_rank.down_gradient(dxa, hidden, down_a.dtype)
    gradients = {f"down_{name}": gradient for name, gradient in found.items()}
    if not any(inward.values()):
        return gradients

    parts = inner_xa.split([len(given[f"{p}_lora_a"]) for p in _INNER], dim=1)
    members = [{**_of(p, given), "xa": part} for p, part in zip(_INNER, parts, strict=True)]
    tokens = None if x is None else single.rows(x).to(base_dtype)
    both, low, products = lora_group.members_backward([wants[p] for p in _INNER], wanted["x"], inner, tokens, members)
    for p, of_member in zip(_INNER, both, strict=True):
        gradients |= {f"{p}_{name}": gradient for name, gradient in of_member.items()}
    if wanted["x"]:
        gradients["x"] = layer.total(low, products, None, x_dtype).view(shape)
    return gradients


op.lora_mlp.forms.accelerated.append(Form("triton", forward, backward, serves, serves_backward))
