"""The gated MLP with LoRA: `kernels/formulas/lora_mlp.py` has the formulas, `lora_linear.py` the products.

The GLU's backward kernel computes dgate, dup and, for dA of `down`, the hidden activation h in one pass. h overwrites
dh; if autograd frees the saved tensors, dgate and dup overwrite gate and up. That saves up to four of the largest
activations.
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
    """Return whether the dtypes are supported: the GLU's has to be that of the products, or float32."""
    weights = (given[f"{p}_weight"] for p in op.PROJECTIONS)
    return (
        activation in glu.ACTIVATIONS
        and proj_dtype is hidden_dtype
        and proj_dtype in (base_dtype, torch.float32)
        and all(layer.serves(x, w, base_dtype, lora_dtype, out_dtype) for w in weights)
    )


def _gated(gate: torch.Tensor, up: torch.Tensor, activation: str, dtype: torch.dtype) -> torch.Tensor:
    """Return h (T, I) = act(gate) * up in `dtype`."""
    hidden = empty(*gate.shape, like=gate, dtype=dtype)
    glu.run_forward(gate, up, activation, hidden)
    return hidden


def _inner(tokens: torch.Tensor, inner_xa: torch.Tensor, given: dict[str, Any]) -> list[torch.Tensor]:
    """Return gate and up (T, I) in `proj_dtype`, from x (T, H) in the compute dtype."""
    members = [op.of(p, given) for p in op.INNER]
    parts = inner_xa.split([len(member.pop("lora_a")) for member in members], dim=1)
    dtype = given["proj_dtype"]
    return [layer.project(tokens, xa, out_dtype=dtype, **m) for xa, m in zip(parts, members, strict=True)]


def restore(x: torch.Tensor, inner_xa: torch.Tensor, base_dtype: torch.dtype, **given: Any) -> tuple[torch.Tensor, ...]:
    """Recompute gate and up, bit for bit as in the forward."""
    inner = _inner(rows(x).to(base_dtype), inner_xa, given)
    return tuple(t.view(*x.shape[:-1], t.shape[1]) for t in inner)


def forward(
    x: torch.Tensor, activation: str, base_dtype: torch.dtype, out_dtype: torch.dtype, **given: Any
) -> tuple[torch.Tensor, ...]:
    tokens = rows(x).to(base_dtype)
    adapters, scaling = ([given[f"{p}_{name}"] for p in op.INNER] for name in ("lora_a", "scaling"))
    inner_xa = lora_group.down(tokens, adapters, scaling)
    gate, up = _inner(tokens, inner_xa, given)
    hidden = _gated(gate, up, activation, base_dtype)
    down = op.of("down", given)
    down_xa = low_rank.down(hidden, [down.pop("lora_a")], single.xa_scaling(down["scaling"], base_dtype))
    y = layer.project(hidden, down_xa, out_dtype=out_dtype, **down)
    shape = x.shape[:-1]
    return y.view(*shape, y.shape[1]), gate.view(*shape, gate.shape[1]), up.view(*shape, up.shape[1]), inner_xa, down_xa


def serves_backward(grads: list[torch.Tensor], **given: Any) -> bool:
    return serves(**given) and grads[0].numel() > 0


def _down_backward(
    wanted: Wanted,
    needs_inner: dict[str, bool],
    dy: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    activation: str,
    may_overwrite: bool,
    xa: torch.Tensor,
    lora_a: torch.Tensor,
    **down: Any,
) -> tuple[Gradients, list[torch.Tensor | None]]:
    """Return the gradients of down's parameters, and dgate and dup (T, I), each None unless in `needs_inner`.

    dgate and dup are in dy's dtype, which is the compute dtype; gate, up and dh may be wider. With `may_overwrite`,
    dgate and dup share the memory of gate and up if their dtypes agree.
    """
    needs_dhidden, dtype = any(needs_inner.values()), dy.dtype
    separately = wanted["weight"] or (wanted["lora_a"] and not needs_dhidden)  # rare: else h comes with dgate and dup
    hidden = _gated(gate, up, activation, dtype) if separately else None
    gradients, dxa = layer.parameter_gradients(wanted, wanted["lora_a"] or needs_dhidden, dy, hidden, xa, **down)
    inner: list[torch.Tensor | None] = [None, None]
    if needs_dhidden:
        assert dxa is not None
        dhidden = layer.sum_products((dxa, lora_a.to(dtype)), [(dy, down["weight"].to(dtype))], None, gate.dtype)
        same_dtype = gate.dtype is dtype
        for i, (p, t) in enumerate(zip(op.INNER, (gate, up), strict=True)):
            if needs_inner[p]:
                inner[i] = t if may_overwrite and same_dtype else empty(*t.shape, like=t, dtype=dtype)
        recomputed = None
        if wanted["lora_a"] and hidden is None:
            recomputed = dhidden if same_dtype else empty(*gate.shape, like=gate, dtype=dtype)
        glu.run_backward(dhidden, gate, up, activation, inner[0], inner[1], recomputed)
        hidden = recomputed if hidden is None else hidden
    if wanted["lora_a"]:
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
    wanted_of = {p: op.wanted_of(p, wanted) for p in op.PROJECTIONS}
    needs_inner = {p: wanted["x"] or any(wanted_of[p].values()) for p in op.INNER}
    down_gradients, inner = _down_backward(
        wanted_of["down"], needs_inner, dy, gate, up, activation, may_overwrite, down_xa, **op.of("down", given)
    )
    gradients = op.gradients_of("down", down_gradients)
    if not any(needs_inner.values()):
        return gradients
    parts = inner_xa.split([len(given[f"{p}_lora_a"]) for p in op.INNER], dim=1)
    members = [{**op.of(p, given), "xa": part} for p, part in zip(op.INNER, parts, strict=True)]
    tokens = None if x is None else rows(x).to(base_dtype)
    of_members, low, products = lora_group.members_backward(
        [wanted_of[p] for p in op.INNER], wanted["x"], inner, tokens, members
    )
    for p, of_member in zip(op.INNER, of_members, strict=True):
        gradients |= op.gradients_of(p, of_member)
    if wanted["x"]:
        dx = layer.sum_products(low, products, None, x_dtype)
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
