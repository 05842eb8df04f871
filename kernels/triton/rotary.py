"""Rotary position embedding: `kernels/formulas/rotary.py` has the formulas.

One kernel computes forward and backward of every layout. Heads may have any strides, so transposed heads cost no copy,
and the angles of a position are loaded once for several heads. q and k, which share their angles, are rotated in one
launch, in which each program has a tile of heads of one of the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels.core import devices
from fastlora.kernels.core.devices import FLOAT_DTYPES, supported
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.formulas import rotary as op
from fastlora.kernels.triton.host import launch, precompile
from fastlora.kernels.triton.rotary_plan import MAX_HEADS, OLDER_MAX_HEADS, Launch, last_dim_contiguous, plan, shape_of

LAYOUTS = ("half", "flipped", "pairs", "interleaved")


@triton.jit
def _load_pairs(ptr, at, mask, ADJACENT: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Load the first and the second entries of P pairs: adjacent if ADJACENT, otherwise P apart."""
    if ADJACENT:
        cols = tl.arange(0, 2 * BLOCK_P)[None, None, :]
        both = tl.load(ptr + at + cols, mask=mask & (cols < 2 * P), other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(both, [both.shape[0], both.shape[1], BLOCK_P, 2]))
    else:
        cols = tl.arange(0, BLOCK_P)[None, None, :]
        first = tl.load(ptr + at + cols, mask=mask & (cols < P), other=0.0).to(tl.float32)
        second = tl.load(ptr + at + cols + P, mask=mask & (cols < P), other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _store_pairs(ptr, at, first, second, mask, ADJACENT: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    dtype = ptr.dtype.element_ty
    if ADJACENT:
        cols = tl.arange(0, 2 * BLOCK_P)[None, None, :]
        tl.store(ptr + at + cols, tl.interleave(first, second).to(dtype), mask=mask & (cols < 2 * P))
    else:
        cols = tl.arange(0, BLOCK_P)[None, None, :]
        tl.store(ptr + at + cols, first.to(dtype), mask=mask & (cols < P))
        tl.store(ptr + at + cols + P, second.to(dtype), mask=mask & (cols < P))


@triton.jit
def _load_angles(ptr, at, mask, TABLE: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Load the factors of the first and of the second entries of pairs.

    TABLE: "once" if both entries share a value that is stored once, else how pairs are stored: "adjacent" or "apart".
    """
    if TABLE == "once":
        cols = tl.arange(0, BLOCK_P)[None, None, :]
        first = tl.load(ptr + at + cols, mask=mask & (cols < P), other=0.0).to(tl.float32)
        second = first
    else:
        first, second = _load_pairs(ptr, at, mask, TABLE == "adjacent", P, BLOCK_P)
    return first, second


@triton.jit
def _rotate_tile(
    x_ptr, y_ptr, cos_ptr, sin_ptr, batch, position, present, tile, H,
    x_batch, x_head, x_position, y_batch, y_head, y_position, cos_at, cos_head, sin_at, sin_head,
    ADJOINT: tl.constexpr, NEGATE: tl.constexpr, ADJACENT_IN: tl.constexpr, ADJACENT_OUT: tl.constexpr,
    TABLE: tl.constexpr, PER_HEAD: tl.constexpr, ROUNDED: tl.constexpr, P: tl.constexpr, REST: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Rotate a tile of heads of one tensor."""
    head = tl.arange(0, BLOCK_H)[None, :, None].to(tl.int64) + tile * BLOCK_H
    mask = present & (head < H)
    if PER_HEAD:
        c1, c2 = _load_angles(cos_ptr, cos_at + head * cos_head, mask, TABLE, P, BLOCK_P)
        s1, s2 = _load_angles(sin_ptr, sin_at + head * sin_head, mask, TABLE, P, BLOCK_P)
    else:
        c1, c2 = _load_angles(cos_ptr, cos_at, present, TABLE, P, BLOCK_P)
        s1, s2 = _load_angles(sin_ptr, sin_at, present, TABLE, P, BLOCK_P)
    x_at = batch * x_batch + position * x_position + head * x_head
    y_at = batch * y_batch + position * y_position + head * y_head
    a, b = _load_pairs(x_ptr, x_at, mask, ADJACENT_IN, P, BLOCK_P)
    a, b = a.to(ROUNDED).to(tl.float32), b.to(ROUNDED).to(tl.float32)
    if ADJOINT:  # the adjoint multiplies by sin before rotating
        s1, s2 = s2, s1
    if NEGATE:
        first, second = a * c1 + b * s1, b * c2 - a * s2
    else:
        first, second = a * c1 - b * s1, b * c2 + a * s2
    _store_pairs(y_ptr, y_at, first, second, mask, ADJACENT_OUT, P, BLOCK_P)
    if REST > 0:
        cols = tl.arange(0, BLOCK_REST)[None, None, :]
        unrotated = tl.load(x_ptr + x_at + 2 * P + cols, mask=mask & (cols < REST), other=0.0).to(tl.float32)
        tl.store(y_ptr + y_at + 2 * P + cols, unrotated.to(y_ptr.dtype.element_ty), mask=mask & (cols < REST))


@precompile.kernel(do_not_specialize=["N", "S"])
def rotary_kernel(
    x0_ptr, x1_ptr, y0_ptr, y1_ptr, cos_ptr, sin_ptr, N, S, H0, H1, tiles0, tiles,
    x0_batch, x0_head, x0_position, x1_batch, x1_head, x1_position,
    y0_batch, y0_head, y0_position, y1_batch, y1_head, y1_position,
    cos_batch, cos_head, cos_position, sin_batch, sin_head, sin_position,
    TWO: tl.constexpr, ADJOINT: tl.constexpr, NEGATE: tl.constexpr,
    ADJACENT_IN: tl.constexpr, ADJACENT_OUT: tl.constexpr, TABLE: tl.constexpr,
    PER_HEAD: tl.constexpr, ROUNDED: tl.constexpr, P: tl.constexpr, REST: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """y = x * cos + rotate(x) * sin, or its adjoint, for BLOCK_S positions and BLOCK_H heads of x0 or of x1.

    ADJACENT_IN, ADJACENT_OUT: the two entries of a pair are adjacent in x, in y. NEGATE: rotate by the negative angle.
    """
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles) * BLOCK_S + tl.arange(0, BLOCK_S)[:, None, None]
    present = row < N
    batch, position = (row // S).to(tl.int64), (row % S).to(tl.int64)
    cos_at = batch * cos_batch + position * cos_position
    sin_at = batch * sin_batch + position * sin_position
    if TWO:
        other = tile - tiles0
        if other >= 0:
            _rotate_tile(
                x1_ptr, y1_ptr, cos_ptr, sin_ptr, batch, position, present, other, H1,
                x1_batch, x1_head, x1_position, y1_batch, y1_head, y1_position, cos_at, cos_head, sin_at, sin_head,
                ADJOINT, NEGATE, ADJACENT_IN, ADJACENT_OUT, TABLE, PER_HEAD, ROUNDED, P, REST,
                BLOCK_H, BLOCK_P, BLOCK_REST,
            )  # fmt: skip
    if tile < tiles0:
        _rotate_tile(
            x0_ptr, y0_ptr, cos_ptr, sin_ptr, batch, position, present, tile, H0,
            x0_batch, x0_head, x0_position, y0_batch, y0_head, y0_position, cos_at, cos_head, sin_at, sin_head,
            ADJOINT, NEGATE, ADJACENT_IN, ADJACENT_OUT, TABLE, PER_HEAD, ROUNDED, P, REST, BLOCK_H, BLOCK_P, BLOCK_REST,
        )  # fmt: skip


# ---- the implementations


def _run(
    adjoint: bool,
    x: Sequence[torch.Tensor],
    dtypes: Sequence[torch.dtype],
    cos: torch.Tensor,
    sin: torch.Tensor,
    *options: Any,
) -> list[torch.Tensor]:
    """Return each x rotated, or the adjoint applied to it, in its dtype of `dtypes`; two per launch where possible."""
    max_heads = MAX_HEADS if devices.capability(cos.device) >= (9, 0) else OLDER_MAX_HEADS
    shapes, tables = tuple(map(shape_of, x)), (shape_of(cos), shape_of(sin))
    planned = plan(max_heads, adjoint, shapes, tuple(dtypes), tables, *options)
    results = [
        launch.allocate((size,), dtype, cos.device).as_strided(shape, strides)
        for size, shape, strides, dtype in planned.results
    ]
    buffers = [
        y if direct else launch.empty(*y.shape, like=y) for y, direct in zip(results, planned.direct, strict=True)
    ]
    inputs, cos, sin = [last_dim_contiguous(each) for each in x], last_dim_contiguous(cos), last_dim_contiguous(sin)
    for each in planned.launches:
        _launch(each, inputs, buffers, cos, sin)
    return [y if y is buffer else y.copy_(buffer) for y, buffer in zip(results, buffers, strict=True)]


def _launch(
    planned: Launch, x: Sequence[torch.Tensor], y: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor
) -> None:
    i, j = planned.members
    rotary_kernel[(planned.programs,)](x[i], x[j], y[i], y[j], cos, sin, *planned.numbers, **planned.constants)


def _serves_group(x: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, **given: Any) -> bool:
    options = given["layout"], given["rotary_dim"], given["compute_dtype"], given["out_dtype"]
    return supported(*x, cos, sin) and _covers(tuple(each.shape for each in x), (cos.shape, sin.shape), *options)


@lru_cache(maxsize=4096)
def _covers(
    x: tuple[torch.Size, ...],
    tables: tuple[torch.Size, torch.Size],
    layout: str,
    rotary_dim: int,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> bool:
    """Return whether the kernel supports heads of these shapes."""
    width = rotary_dim // 2 if layout == "interleaved" else rotary_dim
    return (
        layout in LAYOUTS
        and compute_dtype in FLOAT_DTYPES
        and out_dtype in FLOAT_DTYPES
        and rotary_dim % 2 == 0
        and all(each.numel() > 0 and len(each) <= 4 and 0 < rotary_dim <= each[-1] for each in x)
        and all(table[-1] == width and _broadcasts(table, each) for table in tables for each in x)
    )


def _broadcasts(table: torch.Size, x: torch.Size) -> bool:
    """Return whether the table broadcasts against x in all dimensions but the last."""
    missing = len(x) - len(table)
    return missing >= 0 and all(n in (1, m) for n, m in zip(table[:-1], x[missing:-1], strict=True))


def serves(x: torch.Tensor, **given: Any) -> bool:
    return _serves_group([x], **given)


def forward(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor]:
    (y,) = _run(False, [x], [out_dtype], cos, sin, layout, rotary_dim, compute_dtype)
    return (y,)


def serves_backward(grads: list[torch.Tensor], x: torch.Tensor | None, **given: Any) -> bool:
    return _serves_group(grads, **given)


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
    (dx,) = _run(True, grads, [x_dtype], *options) if wanted["x"] else (None,)
    return {"x": dx, **({} if x is None else op.table_gradients(wanted, grads, [x], *options))}


def group_forward(
    x: list[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: str,
    rotary_dim: int,
    compute_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[list[torch.Tensor]]:
    op.check_dtypes(x)
    return (_run(False, x, [out_dtype] * len(x), cos, sin, layout, rotary_dim, compute_dtype),)


def serves_group_backward(grads: list[list[torch.Tensor | None]], x: list[torch.Tensor | None], **given: Any) -> bool:
    return _serves_group([dy for dy in grads[0] if dy is not None], **given) and supported(*x)


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
    active = {i: dy for i, dy in enumerate(grads[0]) if dy is not None and wanted["x"][i]}
    results = _run(True, list(active.values()), [x_dtype] * len(active), *options)
    dx = dict(zip(active, results, strict=True))
    return {"x": [dx.get(i) for i in range(len(x))], **op.table_gradients(wanted, grads[0], x, *options)}


op.rotary.implementation(
    "triton",
    forward=forward,
    backward=backward,
    serves=serves,
    serves_backward=serves_backward,
    traceable=True,
)
op.rotary_group.implementation(
    "triton",
    forward=group_forward,
    backward=group_backward,
    serves=_serves_group,
    serves_backward=serves_group_backward,
    traceable=True,
)
