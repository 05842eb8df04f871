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

Shapes: x (..., D), e.g. (B, heads, S, D); cos and sin broadcast against x[..., :rotary_dim], e.g. as
(B, 1, S, rotary_dim).  Half precision is widened to float32 and rounded once.  Strides: those of x * cos when all of x
is turned, so transposed heads stay transposed; contiguous when the turned part is joined with the rest.
Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.kernels.op import Gradients, Wanted, op


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
    raise ValueError(f"rotary: layout {layout!r} is none of half, flipped, pairs, interleaved")


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
    dy = grads[0]
    g = dy[..., :rotary_dim].to(_wide(compute_dtype))
    gradients: Gradients = {}
    if wanted["x"]:
        dx = turn_back(g, cos.to(g.dtype), sin.to(g.dtype), layout).to(x_dtype)
        whole = rotary_dim == dy.shape[-1]
        gradients["x"] = dx if whole else torch.cat((dx, dy[..., rotary_dim:].to(x_dtype)), dim=-1)
    if x is not None:
        dcos, dsin = angle_gradients(g, _widen(x[..., :rotary_dim], compute_dtype), layout)
        gradients["cos"] = dcos.sum_to_size(cos.shape).to(cos.dtype) if wanted["cos"] else None
        gradients["sin"] = dsin.sum_to_size(sin.shape).to(sin.dtype) if wanted["sin"] else None
    return gradients


rotary = op(
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
    saves=("x", "cos", "sin"),
    saved_if={"x": lambda wanted, _: wanted["cos"] or wanted["sin"]},
)
