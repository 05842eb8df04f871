"""Rotary position embedding: each pair of entries of a head is turned by an angle that grows with the position.

    t = x[..., :rotary_dim].to(compute_dtype)          the rest of x passes through unturned
    y = (t * cos + rotate(t) * sin).to(out_dtype)

`layout` names which entries form a pair, and so what `rotate` is:

    half       rotate(t) = [-t2, t1], halves of t         Llama, and nearly everyone
    flipped    rotate(t) = [t2, -t1]                      the same, turned the other way
    pairs      rotate(t)[2i], [2i+1] = -t[2i+1], t[2i]    GPT-J, Cohere, GLM
    interleaved                                           DeepSeek: pairs go in, halves come out, and cos and sin are
               y = [even * cos - odd * sin, odd * cos + even * sin]                         rotary_dim / 2 wide

Backward.  Turning is linear in x, and `rotate` is antisymmetric for the first three layouts, so the adjoint is

    dt = dy * cos - rotate(dy * sin)        dcos = dy * t        dsin = dy * rotate(t)

the last two summed over the dimensions that cos and sin broadcast along.  sin stays under `rotate`: nothing says that
the two entries of a pair share it.  For `interleaved`, with dy = [d1, d2]:

    deven = d1 * cos + d2 * sin        dodd = d2 * cos - d1 * sin
    dcos = d1 * even + d2 * odd        dsin = d2 * even - d1 * odd

Saved: cos and sin.  x only where they want a gradient, which in a transformer they do not.

`rotary_group` turns several x by the same angles, as q and k are: the heads may differ in number.  A member whose
output received no gradient gets none; dcos and dsin sum over the others.

Shapes: x (..., D), e.g. (B, heads, S, D); cos and sin broadcast against x[..., :rotary_dim], e.g. as
(B, 1, S, rotary_dim).  Half precision is widened to float32 and rounded once.  Strides: those of x * cos when all of x
is turned, so transposed heads stay transposed; contiguous when the turned part is joined with the rest.
Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch

from fastlora.kernels.core.cost import Cost, Work
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.library import register_op

LAYOUTS = ("half", "flipped", "pairs", "interleaved")


def rotate(t: torch.Tensor, layout: str) -> torch.Tensor:
    """t's partner in every pair, with the sign of a quarter turn; its transpose is its negative."""
    if layout == "pairs":
        even, odd = t[..., 0::2], t[..., 1::2]
        return torch.stack((-odd, even), dim=-1).flatten(-2)
    first, second = t.chunk(2, dim=-1)
    if layout == "half":
        return torch.cat((-second, first), dim=-1)
    if layout == "flipped":
        return torch.cat((second, -first), dim=-1)
    raise ValueError(f"rotary: layout {layout!r} is none of {', '.join(LAYOUTS)}")


def turn(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str) -> torch.Tensor:
    """The formula of y, in whatever dtype the operands have."""
    if layout == "interleaved":
        even, odd = t[..., 0::2], t[..., 1::2]
        return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return t * cos + rotate(t, layout) * sin


def turn_back(g: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str) -> torch.Tensor:
    """The adjoint of `turn` in t."""
    if layout == "interleaved":
        first, second = g.chunk(2, dim=-1)
        return torch.stack((first * cos + second * sin, second * cos - first * sin), dim=-1).flatten(-2)
    return g * cos - rotate(g * sin, layout)


def angle_gradients(g: torch.Tensor, t: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of cos and sin, before they are summed to their shapes."""
    if layout == "interleaved":
        (first, second), even, odd = g.chunk(2, dim=-1), t[..., 0::2], t[..., 1::2]
        return first * even + second * odd, second * even - first * odd
    return g * t, g * rotate(t, layout)


def reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Rotary embedding as the models write it. Returns y of x's shape in `out_dtype`."""
    y = turn(x[..., :rotary_dim].to(compute_dtype), cos, sin, layout).to(out_dtype)
    return y if rotary_dim == x.shape[-1] else torch.cat((y, x[..., rotary_dim:].to(out_dtype)), dim=-1)


def _widen(t: torch.Tensor, compute_dtype: torch.dtype) -> torch.Tensor:
    return t.to(compute_dtype).to(_wide(compute_dtype))


def _wide(compute_dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(compute_dtype, torch.float32)


def forward(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor]:
    whole = rotary_dim == x.shape[-1]
    t = _widen(x if whole else x[..., :rotary_dim], compute_dtype)
    y = turn(t, cos.to(t.dtype), sin.to(t.dtype), layout).to(out_dtype)
    return (y if whole else torch.cat((y, x[..., rotary_dim:].to(out_dtype)), dim=-1),)


def gradient(
    dy: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    compute_dtype: torch.dtype,
    x_dtype: torch.dtype,
) -> torch.Tensor:
    """The gradient of x."""
    whole = rotary_dim == dy.shape[-1]
    g = (dy if whole else dy[..., :rotary_dim]).to(_wide(compute_dtype))
    dx = turn_back(g, cos.to(g.dtype), sin.to(g.dtype), layout).to(x_dtype)
    return dx if whole else torch.cat((dx, dy[..., rotary_dim:].to(x_dtype)), dim=-1)


def table_gradients(
    wanted: Wanted,
    grads: Sequence[torch.Tensor | None],
    x: Sequence[torch.Tensor | None],
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    compute_dtype: torch.dtype,
) -> Gradients:
    """The gradients of cos and sin, as far as they are wanted, summed over all that was turned by them."""
    tables = {name: table for name, table in (("cos", cos), ("sin", sin)) if wanted[name]}
    sums: dict[str, list[torch.Tensor]] = {name: [] for name in tables}
    for dy, each in zip(grads, x, strict=True) if tables else ():
        if dy is not None and each is not None:
            g = dy[..., :rotary_dim].to(_wide(compute_dtype))
            found = angle_gradients(g, _widen(each[..., :rotary_dim], compute_dtype), layout)
            for name, dtable in zip(("cos", "sin"), found, strict=True):
                if name in tables:
                    sums[name].append(dtable.sum_to_size(tables[name].shape))
    return {name: _sum(sums[name]).to(table.dtype) for name, table in tables.items()}


def _sum(summands: list[torch.Tensor]) -> torch.Tensor:
    return reduce(torch.add, summands)


def backward(
    wanted: Wanted,
    grads: list[torch.Tensor],
    x: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    x_dtype: torch.dtype,
    layout: str,
    rotary_dim: int,
    compute_dtype: torch.dtype,
    **_: Any,
) -> Gradients:
    how = (cos, sin, layout, rotary_dim, compute_dtype)
    dx = gradient(grads[0], *how, x_dtype) if wanted["x"] else None
    return {"x": dx, **({} if x is None else table_gradients(wanted, grads, [x], *how))}


_PASS = Work(flops="3*T*M*D", bytes="(2*T*M*D + 2*T*D)*b")
_COST = Cost(forward=_PASS, backward=_PASS)

rotary = register_op(
    "rotary",
    family="rotary",
    schema=(
        "(Tensor x, Tensor cos, Tensor sin, str layout, int rotary_dim, "
        "ScalarType compute_dtype, ScalarType out_dtype) -> (Tensor y)"
    ),
    outputs=1,
    reference=reference,
    forward=forward,
    backward=backward,
    traceable=True,
    saves=("x", "cos", "sin"),
    saved_if={"x": lambda wanted, _: wanted["cos"] or wanted["sin"]},
    choices={"layout": LAYOUTS},
    cost=_COST,
)


def group_reference(x: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, **how: Any) -> list[torch.Tensor]:
    """Each x turned by the same angles. Returns one y for each."""
    return [reference(each, cos, sin, **how) for each in x]


def one_dtype(x: Sequence[torch.Tensor]) -> None:
    """Raises ValueError if members differ in dtype."""
    if len({each.dtype for each in x}) > 1:
        raise ValueError(f"rotary_group: x of several dtypes, {', '.join(str(each.dtype) for each in x)}; cast them")


def group_forward(x: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, **how: Any) -> tuple[list[torch.Tensor]]:
    one_dtype(x)
    return ([forward(each, cos, sin, **how)[0] for each in x],)


def group_backward(
    wanted: Wanted,
    grads: list[list[torch.Tensor | None]],
    x: list[torch.Tensor | None],
    cos: torch.Tensor,
    sin: torch.Tensor,
    x_dtype: torch.dtype,
    layout: str,
    rotary_dim: int,
    compute_dtype: torch.dtype,
    **_: Any,
) -> Gradients:
    how = (cos, sin, layout, rotary_dim, compute_dtype)
    dx = [
        gradient(dy, *how, x_dtype) if want and dy is not None else None
        for want, dy in zip(wanted["x"], grads[0], strict=True)
    ]
    return {"x": dx, **table_gradients(wanted, grads[0], x, *how)}


rotary_group = register_op(
    "rotary_group",
    family="rotary",
    schema=(
        "(Tensor[] x, Tensor cos, Tensor sin, str layout, int rotary_dim, "
        "ScalarType compute_dtype, ScalarType out_dtype) -> (Tensor[] y)"
    ),
    outputs=1,
    reference=group_reference,
    forward=group_forward,
    backward=group_backward,
    traceable=True,
    saves=("x", "cos", "sin"),
    saved_if={"x": lambda wanted, _: wanted["cos"] or wanted["sin"]},
    choices={"layout": LAYOUTS},
    cost=_COST,
)
