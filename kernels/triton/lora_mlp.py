"""The gated MLP with adapters: `kernels/formulas/lora_mlp.py` has the formulas, `lora_linear.py` the products.

The gated unit's backward makes dgate, dup and, for down's dA, the hidden activation h in one pass. h takes the place of
its gradient, and in a last backward dgate and dup those of gate and up: four activations less of the largest size.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.numerics import rows
from fastlora.kernels.formulas import lora_linear as single
from fastlora.kernels.formulas import lora_mlp as op
from fastlora.kernels.triton import glu, lora_group
from fastlora.kernels.triton import lora_linear as layer
from fastlora.kernels.triton.blocks import low_rank
from fastlora.kernels.triton.host.launch import empty


def serves(
    x: torch.Tensor | None,
    activation: str,
    base_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    proj_dtype: torch.dtype,
    hidden_dtype: torch.dtype,
    out_dtype: torch.dtype,
    **given: Any,
) -> bool:
    """The gated unit lies between the layers' products, so it has their dtype; or float32, as around a residual stream
    of that."""
    weights = (given[f"{p}_weight"] for p in op.PROJECTIONS)
    return (
        activation in glu.ACTIVATIONS
        and proj_dtype is hidden_dtype
        and proj_dtype in (base_dtype, torch.float32)
        and all(layer.serves(x, w, base_dtype, lora_dtype, out_dtype) for w in weights)
    )


def _gated(gate: torch.Tensor, up: torch.Tensor, activation: str, dtype: torch.dtype) -> torch.Tensor:
    """h (T, I) = act(gate) * up, in the dtype that down reads it in."""
    hidden = empty(*gate.shape, like=gate, dtype=dtype)
    glu.run_forward(gate, up, activation, hidden)
    return hidden


def _inner(tokens: torch.Tensor, inner_xa: torch.Tensor, given: dict[str, Any]) -> list[torch.Tensor]:
    """gate and up (T, I), in `proj_dtype`, of x (T, H), whose dtype is that of the computation."""
    members = [op.of(p, given) for p in op.INNER]
    parts = inner_xa.split([len(member.pop("lora_a")) for member in members], dim=1)
    dtype = given["proj_dtype"]
    return [layer.project(tokens, xa, out_dtype=dtype, **m) for xa, m in zip(parts, members, strict=True)]


def restore(x: torch.Tensor, inner_xa: torch.Tensor, base_dtype: torch.dtype, **given: Any) -> tuple[torch.Tensor, ...]:
    """gate and up as the forward made them."""
    made = _inner(rows(x).to(base_dtype), inner_xa, given)
    return tuple(t.view(*x.shape[:-1], t.shape[1]) for t in made)


def forward(
    x: torch.Tensor, activation: str, base_dtype: torch.dtype, out_dtype: torch.dtype, **given: Any
) -> tuple[torch.Tensor, ...]:
    tokens = rows(x).to(base_dtype)
    adapters, scaling = ([given[f"{p}_{name}"] for p in op.INNER] for name in ("lora_a", "scaling"))
    inner_xa = lora_group.down(tokens, adapters, scaling)
    gate, up = _inner(tokens, inner_xa, given)
    hidden = _gated(gate, up, activation, base_dtype)
    down = op.of("down", given)
    down_xa = low_rank.down(hidden, [down.pop("lora_a")], single.carried(down["scaling"], base_dtype))
    y = layer.project(hidden, down_xa, out_dtype=out_dtype, **down)
    shape = x.shape[:-1]
    return y.view(*shape, y.shape[1]), gate.view(*shape, gate.shape[1]), up.view(*shape, up.shape[1]), inner_xa, down_xa


def serves_backward(grads: list[torch.Tensor], **given: Any) -> bool:
    return serves(**given) and grads[0].numel() > 0


def _down_backward(
    want: Wanted,
    inward: dict[str, bool],
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    may_overwrite: bool,
    xa: torch.Tensor,
    lora_a: torch.Tensor,
    **down: Any,
) -> tuple[Gradients, list[torch.Tensor | None]]:
    """Return the gradients of down's parameters, and dgate and dup where `inward` has them wanted.

    They are in the memory of gate and up if that `may_overwrite`. All are in dy's dtype, that of the computation; gate
    and up, and with them the gradient of h, may be wider."""
    goes_on, dtype = any(inward.values()), dy.dtype
    alone = want["weight"] or (want["lora_a"] and not goes_on)  # rare: else h is made along with dgate and dup
    hidden = _gated(gate, up, activation, dtype) if alone else None
    gradients, dxa = layer.parameter_gradients(want, want["lora_a"] or goes_on, dy, hidden, xa, **down)
    inner: list[torch.Tensor | None] = [None, None]
    if goes_on:
        assert dxa is not None
        dhidden = layer.total((dxa, lora_a.to(dtype)), [(dy, down["weight"].to(dtype))], None, gate.dtype)
        fits = gate.dtype is dtype
        for i, (p, t) in enumerate(zip(op.INNER, (gate, up), strict=True)):
            if inward[p]:
                inner[i] = t if may_overwrite and fits else empty(*t.shape, like=t, dtype=dtype)
        made = None
        if want["lora_a"] and hidden is None:
            made = dhidden if fits else empty(*gate.shape, like=gate, dtype=dtype)
        glu.run_backward(dhidden, gate, up, activation, inner[0], inner[1], made)
        hidden = made if hidden is None else hidden
    if want["lora_a"]:
        assert dxa is not None
        assert hidden is not None
        gradients["lora_a"] = low_rank.down_gradient(dxa, hidden, lora_a.dtype)
    return gradients, inner


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
    may_overwrite: bool = False,
    **given: Any,
) -> Gradients:
    dy, gate, up = (rows(t) for t in (grads[0].to(base_dtype), gate, up))
    wants = {p: op.wants_of(p, wanted) for p in op.PROJECTIONS}
    inward = {p: wanted["x"] or any(wants[p].values()) for p in op.INNER}
    down = op.of("down", given)
    found, inner = _down_backward(wants["down"], inward, dy, gate, up, activation, may_overwrite, down_xa, **down)
    gradients = op.gradients_of("down", found)
    if not any(inward.values()):
        return gradients
    parts = inner_xa.split([len(given[f"{p}_lora_a"]) for p in op.INNER], dim=1)
    members = [{**op.of(p, given), "xa": part} for p, part in zip(op.INNER, parts, strict=True)]
    tokens = None if x is None else rows(x).to(base_dtype)
    both, low, products = lora_group.members_backward([wants[p] for p in op.INNER], wanted["x"], inner, tokens, members)
    for p, of_member in zip(op.INNER, both, strict=True):
        gradients |= op.gradients_of(p, of_member)
    if wanted["x"]:
        dx = layer.total(low, products, None, x_dtype)
        gradients["x"] = dx.view(*grads[0].shape[:-1], dx.shape[1])
    return gradients


op.lora_mlp.implementation(
    "triton",
    forward=forward,
    backward=backward,
    serves=serves,
    serves_backward=serves_backward,
    restore=restore,
    traceable=True,
)
