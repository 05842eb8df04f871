"""LoRA layers with a shared input: `kernels/formulas/lora_group.py` has the formulas, `lora_linear.py` the products.

The members' thin factors are concatenated, so one pass over x computes all xa and another all dA, and the input
gradient is one sum of the members' products.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.numerics import Addend, rows
from fastlora.kernels.formulas import lora_group as op
from fastlora.kernels.formulas import lora_linear as single
from fastlora.kernels.formulas.dropout import check_argument
from fastlora.kernels.triton import lora_linear as layer
from fastlora.kernels.triton.blocks import low_rank
from fastlora.kernels.triton.host.launch import allocate

Members = list[dict[str, Any]]


def down(x: torch.Tensor, lora_a: list[torch.Tensor], scaling: list[float]) -> torch.Tensor:
    """Return the members' xa, with the scaling that they are saved with, concatenated to (T, sum of R)."""
    scaling = [single.xa_scaling(s, x.dtype) for s in scaling]
    if len(set(scaling)) == 1:
        return low_rank.down(x, lora_a, scaling[0])
    return torch.cat([low_rank.down(x, [a], s) for a, s in zip(lora_a, scaling, strict=True)], dim=1)


def members_backward(
    wanted: list[Wanted], needs_x: bool, grads: list[torch.Tensor | None], x: torch.Tensor | None, members: Members
) -> tuple[list[Gradients], Addend | None, list[Addend]]:
    """Return the gradients of each member's parameters, and the low-rank addend and the other addends of dx.

    Args:
        wanted: which gradients of each member's parameters to compute.
        needs_x: whether to return the addends of dx.
        grads: dy_i (T, N_i) in the compute dtype; members without one are skipped.
        x: (T, K) in the compute dtype, if saved.
        members: `lora_a`, `lora_b`, `xa`, `weight`, `bias`, `lora_bias` and `scaling` of each. A member with dropout
            also has `dropped`, a function that recomputes its dropped-out input for dA; the caller has to mask its part
            of the low-rank addend.
    """
    active = [i for i, dy in enumerate(grads) if dy is not None and (needs_x or any(wanted[i].values()))]
    ranks = {i: len(members[i]["lora_a"]) for i in active if needs_x or wanted[i]["lora_a"]}
    first = next(dy for dy in grads if dy is not None)
    dxa = allocate((len(first), sum(ranks.values())), first.dtype, first.device) if ranks else None
    parts = dict(zip(ranks, dxa.split(list(ranks.values()), dim=1), strict=True)) if dxa is not None else {}
    gradients: list[Gradients] = [{} for _ in members]
    for i in active:
        given = {n: v for n, v in members[i].items() if n not in ("lora_a", "dropped")}
        dy = grads[i]
        assert dy is not None
        gradients[i], _ = layer.parameter_gradients(wanted[i], i in ranks, dy, x, dxa=parts.get(i), **given)
    if dxa is not None and any(wanted[i]["lora_a"] for i in ranks):
        _down_gradients(gradients, wanted, ranks, parts, dxa, x, members)
    if not needs_x or dxa is None:
        return gradients, None, []
    stacked = torch.cat([members[i]["lora_a"].to(first.dtype) for i in ranks])
    products = [(dy, members[i]["weight"].to(first.dtype)) for i in active if (dy := grads[i]) is not None]
    return gradients, (dxa, stacked), products


def _down_gradients(
    gradients: list[Gradients],
    wanted: list[Wanted],
    ranks: dict[int, int],
    parts: dict[int, torch.Tensor],
    dxa: torch.Tensor,
    x: torch.Tensor | None,
    members: Members,
) -> None:
    """Add each dA to `gradients`: in one pass over x if all are needed, have one dtype and no member has dropout."""
    dtypes = {members[i]["lora_a"].dtype for i in ranks}
    dropped = {i: z for i in ranks if (z := members[i].get("dropped")) is not None}
    if x is not None and len(dtypes) == 1 and not dropped and all(wanted[i]["lora_a"] for i in ranks):
        stacked = low_rank.down_gradient(dxa, x, dtypes.pop())
        for i, da in zip(ranks, stacked.split(list(ranks.values())), strict=True):
            gradients[i]["lora_a"] = da.clone() if len(ranks) > 1 else da
        return
    for i, part in parts.items():
        z = dropped[i]() if i in dropped and wanted[i]["lora_a"] else x
        if wanted[i]["lora_a"] and z is not None:
            gradients[i]["lora_a"] = low_rank.down_gradient(part.contiguous(), z, members[i]["lora_a"].dtype)


def _has_dropout(seed: list[torch.Tensor | None], dropout: list[float | None]) -> bool:
    """Return whether any member has dropout; raise ValueError for a seed without a probability or vice versa."""
    for member in zip(seed, dropout, strict=True):
        check_argument(*member)
    return any(s is not None for s in seed)


def _dropped_down(
    x: torch.Tensor,
    tokens: torch.Tensor,
    lora_a: list[torch.Tensor],
    scaling: list[float],
    seed: list[torch.Tensor | None],
    dropout: list[float | None],
) -> torch.Tensor:
    """Do what `down` does for members that may have dropout."""
    parts = []
    for a, s, member_seed, p in zip(lora_a, scaling, seed, dropout, strict=True):
        z = tokens if member_seed is None else layer.dropped_out(x, member_seed, p, tokens.dtype)
        parts.append(low_rank.down(z, [a], single.xa_scaling(s, tokens.dtype)))
    return torch.cat(parts, dim=1)


def _masked_sum(low: Addend | None, products: list[Addend], members: Members, dtype: torch.dtype) -> torch.Tensor:
    """Return dx in `dtype` from the concatenated low-rank addends and the others, where some members have dropout."""
    assert low is not None
    ranks = [len(member["lora_a"]) for member in members]
    first, *others = products
    dx = layer.sum_products(first, others, None, dtype) if others else layer.sum_products(None, products, None, dtype)
    for member, left, right in zip(members, low[0].split(ranks, dim=1), low[1].split(ranks), strict=True):
        dz, seed = torch.mm(left, right), member["seed"]
        dx = dx.add_(dz) if seed is None else layer.masked_sum(dx, dz, seed, member["dropout"], dtype)
    return dx


def serves(
    x: torch.Tensor | None,
    weight: list[torch.Tensor],
    base_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    out_dtype: torch.dtype,
    **_: Any,
) -> bool:
    return all(layer.serves(x, w, base_dtype, lora_dtype, out_dtype) for w in weight)


def forward(
    x: torch.Tensor,
    lora_a: list[torch.Tensor],
    scaling: list[float],
    base_dtype: torch.dtype,
    lora_dtype: torch.dtype,
    out_dtype: torch.dtype,
    seed: list[torch.Tensor | None],
    dropout: list[float | None],
    **lists: list[Any],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    tokens = rows(x).to(base_dtype)
    if _has_dropout(seed, dropout):
        xa = _dropped_down(x, tokens, lora_a, scaling, seed, dropout)
    else:
        xa = down(tokens, lora_a, scaling)
    ys = []
    for i, part in enumerate(xa.split([len(a) for a in lora_a], dim=1)):
        member = {name: values[i] for name, values in lists.items()}
        ys.append(layer.project(tokens, part, scaling=scaling[i], out_dtype=out_dtype, **member))
    return [y.view(*x.shape[:-1], y.shape[1]) for y in ys], xa


def serves_backward(grads: list[list[torch.Tensor | None]], **given: Any) -> bool:
    return serves(**given) and all(dy is None or dy.numel() > 0 for dy in grads[0])


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
    lists["xa"] = list(xa.split([len(a) for a in lists["lora_a"]], dim=1))
    seed, dropout = lists.pop("seed"), lists.pop("dropout")
    members = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    wanted_of_members = [{name: wanted[name][i] for name in single.PARAMETERS} for i in range(len(members))]
    tokens = None if x is None else rows(x).to(base_dtype)
    for member, s, p in zip(members, seed, dropout, strict=True):
        if s is not None and x is not None:
            member["dropped"] = partial(layer.dropped_out, x, s, p, base_dtype)
    dys = [None if dy is None else rows(dy).to(base_dtype) for dy in grads[0]]
    of_members, low, products = members_backward(wanted_of_members, wanted["x"], dys, tokens, members)
    gradients: Gradients = {name: [of_member.get(name) for of_member in of_members] for name in single.PARAMETERS}
    if wanted["x"]:
        shape = next(dy.shape[:-1] for dy in grads[0] if dy is not None)
        if any(s is not None for s in seed):
            active = [
                {"lora_a": member["lora_a"], "seed": s, "dropout": p}
                for member, s, p, dy in zip(members, seed, dropout, dys, strict=True)
                if dy is not None
            ]
            dx = _masked_sum(low, products, active, x_dtype)
        else:
            dx = layer.sum_products(low, products, None, x_dtype)
        gradients["x"] = dx.view(*shape, dx.shape[1])
    return gradients


op.lora_group.implementation(
    "triton",
    forward=forward,
    backward=backward,
    serves=serves,
    serves_backward=serves_backward,
    traceable=True,
)
