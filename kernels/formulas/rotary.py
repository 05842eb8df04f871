"""Rotary position embedding: each pair of entries of a head is rotated by an angle that grows with the position.

    t = x[..., :rotary_dim].to(compute_dtype)          the rest of x is not rotated
    y = (t * cos + rotate(t) * sin).to(out_dtype)

`layout` names which entries form a pair, and so what `rotate` is:

    half       rotate(t) = [-t2, t1], halves of t         Llama, and most models
    flipped    rotate(t) = [t2, -t1]                      the same in the opposite direction
    pairs      rotate(t)[2i], [2i+1] = -t[2i+1], t[2i]    GPT-J, Cohere, GLM
    interleaved                                           DeepSeek: from pairs to halves, and cos and sin are
               y = [even * cos - odd * sin, odd * cos + even * sin]                  rotary_dim / 2 wide

Backward.  y is linear in x, and `rotate` is antisymmetric for the first three layouts, so the adjoint is

    dt = dy * cos - rotate(dy * sin)        dcos = dy * t        dsin = dy * rotate(t)

the last two summed over the dimensions that cos and sin broadcast along.  sin stays inside `rotate`, since the two
entries of a pair need not share it.  For `interleaved`, with dy = [d1, d2]:

    deven = d1 * cos + d2 * sin        dodd = d2 * cos - d1 * sin
    dcos = d1 * even + d2 * odd        dsin = d2 * even - d1 * odd

Saved: cos and sin; x only if one of these requires a gradient, which they do not in a transformer.

`rotary_group` rotates several x, such as q and k, by the same angles; they may differ in the number of heads.  A member
whose output received no gradient gets none; dcos and dsin are summed over the others.

Shapes: x (..., D), e.g. (B, heads, S, D); cos and sin broadcast against x[..., :rotary_dim], e.g. as (B, 1, S,
rotary_dim).  Half precision is computed in float32 and rounded once.  Strides: those of x * cos if all of x is rotated,
so transposed heads stay transposed; contiguous if the rotated part is concatenated with the rest. Source: Su et al.,
"RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
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
    """Return `rotate(t)` of the module's docstring.

    Raises:
        ValueError: for an unknown layout.
    """
    if layout == "pairs":
        even, odd = t[..., 0::2], t[..., 1::2]
        return torch.stack((-odd, even), dim=-1).flatten(-2)
    first, second = t.chunk(2, dim=-1)
    if layout == "half":
        return torch.cat((-second, first), dim=-1)
    if layout == "flipped":
        return torch.cat((second, -first), dim=-1)
    raise ValueError(f"rotary: layout must be one of {', '.join(LAYOUTS)}; got {layout!r}")


def apply_rotary(t: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str) -> torch.Tensor:
    """Return t * cos + rotate(t) * sin, or its form for `interleaved`, in the dtype of the operands."""
    if layout == "interleaved":
        even, odd = t[..., 0::2], t[..., 1::2]
        return torch.cat((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return t * cos + rotate(t, layout) * sin


def apply_adjoint(g: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, layout: str) -> torch.Tensor:
    """Return the adjoint of `apply_rotary` in t, applied to g."""
    if layout == "interleaved":
        first, second = g.chunk(2, dim=-1)
        return torch.stack((first * cos + second * sin, second * cos - first * sin), dim=-1).flatten(-2)
    return g * cos - rotate(g * sin, layout)


def angle_gradients(g: torch.Tensor, t: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of cos and sin, before they are summed to their shapes."""
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
    """Compute rotary embedding as models do. Return y of x's shape in `out_dtype`."""
    y = apply_rotary(x[..., :rotary_dim].to(compute_dtype), cos, sin, layout).to(out_dtype)
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
    is_full = rotary_dim == x.shape[-1]
    t = _widen(x if is_full else x[..., :rotary_dim], compute_dtype)
    y = apply_rotary(t, cos.to(t.dtype), sin.to(t.dtype), layout).to(out_dtype)
    return (y if is_full else torch.cat((y, x[..., rotary_dim:].to(out_dtype)), dim=-1),)


def gradient(
    dy: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    compute_dtype: torch.dtype,
    x_dtype: torch.dtype,
) -> torch.Tensor:
    """Return the gradient of x in `x_dtype`."""
    is_full = rotary_dim == dy.shape[-1]
    g = (dy if is_full else dy[..., :rotary_dim]).to(_wide(compute_dtype))
    dx = apply_adjoint(g, cos.to(g.dtype), sin.to(g.dtype), layout).to(x_dtype)
    return dx if is_full else torch.cat((dx, dy[..., rotary_dim:].to(x_dtype)), dim=-1)


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
    """Return the wanted gradients of cos and sin, summed over all members x."""
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
    options = (cos, sin, layout, rotary_dim, compute_dtype)
    dx = gradient(grads[0], *options, x_dtype) if wanted["x"] else None
    return {"x": dx, **({} if x is None else table_gradients(wanted, grads, [x], *options))}


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


def group_reference(x: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Compute `reference` of each x; return one y for each."""
    return [reference(each, cos, sin, **options) for each in x]


def check_dtypes(x: Sequence[torch.Tensor]) -> None:
    """Raise ValueError if members differ in dtype."""
    if len({each.dtype for each in x}) > 1:
        raise ValueError(f"rotary_group: x of several dtypes, {', '.join(str(each.dtype) for each in x)}; cast them")


def group_forward(
    x: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, **options: Any
) -> tuple[list[torch.Tensor]]:
    check_dtypes(x)
    return ([forward(each, cos, sin, **options)[0] for each in x],)


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
    options = (cos, sin, layout, rotary_dim, compute_dtype)
    dx = [
        gradient(dy, *options, x_dtype) if want and dy is not None else None
        for want, dy in zip(wanted["x"], grads[0], strict=True)
    ]
    return {"x": dx, **table_gradients(wanted, grads[0], x, *options)}


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
