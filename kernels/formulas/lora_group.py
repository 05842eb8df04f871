"""Several LoRA layers with a shared input, such as q, k, v or gate, up:  y_i = base_i(x) + s_i low_i(x).

Each member is a `lora_linear`, with its roundings, optionally with dropout from a seed of its own; `lora_linear.py` has
the formulas.

Backward.  The gradients of parameters are those of `lora_linear`, and the input gradient is the sum over the members:

    dx = sum over i of (dy_i W_i + (dxa_i A_i) * m_i)        m_i = 1 without dropout

as one chain of products that are added onto each other, where eager materializes 2n tensors of x's size. Adding a
masked product takes an extra pass. Members whose output received no gradient are skipped.

Saved: x once, if any W or A is trained; s_i xa_i concatenated, one row of the sum of R_i per token.

Shapes: x (..., K), W_i (N_i, K), A_i (R_i, K), B_i (N_i, R_i), y_i (..., N_i).  Members may differ in N and in R; the
cost is that of M members of one R, with N the sum of theirs.
Source: first principles.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from fastlora.kernels.core.cost import Cost, Work
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.library import register_op
from fastlora.kernels.core.numerics import Addend, sum_products
from fastlora.kernels.core.semantic_op import Policy
from fastlora.kernels.formulas import lora_linear as single
from fastlora.kernels.formulas.dropout import dropped_out

_LISTS = (*single.PARAMETERS, "scaling", "seed", "dropout")


def _members(lists: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Yield a dict of each member's values."""
    for values in zip(*lists.values(), strict=True):
        yield dict(zip(lists, values, strict=True))


def reference(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    bias: list[torch.Tensor | None],
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    lora_bias: list[torch.Tensor | None],
    scaling: list[float],
    base_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    out_dtype: torch.dtype,
    seed: list[torch.Tensor | None],
    dropout: list[float | None],
) -> list[torch.Tensor]:
    """Compute the adapted layers as PEFT does. Return one y of shape (..., N) in `out_dtype` for each."""
    dtypes: dict[str, Any] = {"base_dtype": base_dtype, "lora_dtype": lora_dtype, "out_dtype": out_dtype}
    lists: list[list[Any]] = [weight, bias, lora_a, lora_b, lora_bias, scaling, seed, dropout]
    members = _members(dict(zip(_LISTS, lists, strict=True)))
    return [single.reference(x, None, **member, **dtypes) for member in members]


def forward(x: torch.Tensor, **arguments: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    lists = {name: arguments.pop(name) for name in _LISTS}
    results = [single.forward(x, None, **member, **arguments) for member in _members(lists)]
    return [y for y, _ in results], torch.cat([xa for _, xa in results], dim=1)


def backward(
    wanted: Wanted,
    grads: list[list[torch.Tensor | None]],
    x: torch.Tensor | None,
    xa: torch.Tensor,
    x_dtype: torch.dtype,
    base_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    out_dtype: torch.dtype,
    **lists: list[Any],
) -> Gradients:
    lists["xa"] = list(xa.split([a.shape[0] for a in lists["lora_a"]], dim=1))
    wanted_of_members = _members({name: wanted[name] for name in single.PARAMETERS})
    gradients: dict[str, list[torch.Tensor | None]] = {name: [] for name in single.PARAMETERS}
    addends: list[Addend] = []
    masked: list[tuple[Addend, torch.Tensor, float]] = []
    for dy, wanted_of_member, member in zip(grads[0], wanted_of_members, _members(lists), strict=True):
        of_member: Gradients = {}
        seed, p = member.pop("seed"), member.pop("dropout")
        if dy is not None:
            z = dropped_out(x, seed, p, lora_dtype) if x is not None and wanted_of_member["lora_a"] else None
            of_member, dx, dz = single.parts_backward(
                wanted_of_member, wanted["x"], dy, x, z, base_dtype=base_dtype, lora_dtype=lora_dtype, **member
            )
            addends += dx if seed is not None else dx + dz
            masked += [(low, seed, p) for low in dz] if seed is not None else []
        for name, collected in gradients.items():
            collected.append(of_member.get(name))
    if not wanted["x"]:
        return dict(gradients)
    tokens = next(dy.shape[:-1] for dy in grads[0] if dy is not None)
    total = sum_products(addends, x_dtype)
    for (left, right), seed, p in masked:
        total = dropped_out(left @ right, seed, p, x_dtype, total)
    return {**gradients, "x": total.reshape(*tokens, lists["weight"][0].shape[1])}


lora_group = register_op(
    "lora_group",
    family="lora",
    schema=(
        "(Tensor x, Tensor[] weight, Tensor?[] bias, Tensor[] lora_a, Tensor[] lora_b, Tensor?[] lora_bias, "
        "float[] scaling, ScalarType base_dtype, ScalarType lora_dtype, ScalarType out_dtype, "
        "Tensor?[] seed, float?[] dropout) -> (Tensor[] y, Tensor xa)"
    ),
    outputs=1,
    reference=reference,
    forward=forward,
    backward=backward,
    traceable=True,
    saves=("x", *single.PARAMETERS, "xa", "seed"),
    saved_if={"x": lambda wanted, _: any(wanted["weight"]) or any(wanted["lora_a"])},
    policy=Policy(reads_quantized=("weight",), outputs_mutable=True),
    cost=Cost(
        forward=Work(flops="2*T*N*K + 2*T*R*(N + M*K)", bytes="(T*K + T*N + M*T*R)*b + N*K*w + R*(N + M*K)*p"),
        backward=Work(flops="2*T*N*K + 4*T*R*(N + M*K)", bytes="(2*T*K + T*N + M*T*R)*b + N*K*w + 2*R*(N + M*K)*p"),
    ),
)
