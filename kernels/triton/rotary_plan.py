"""Launch plans of rotary embeddings, cached by shape: computing one takes longer than a launch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton.language as tl

from fastlora.kernels.formulas import rotary as op
from fastlora.kernels.triton.host.launch import TL_DTYPES, cdiv, power_of_two

# Measured on an H200, bfloat16, heads of 128 and 256 entries.
PAIRS, MAX_HEADS, WARPS = 256, 4, 2
OLDER_MAX_HEADS = 2
"""Pairs that a warp rotates at a time, 8 per thread; the maximum heads of a tile (before Hopper, four heads spill
registers); warps of a program.

All pairs of a warp belong to one head, so a thread has the same pairs in every head of its tile, and loads only the
angles that it needs."""

Shape = tuple[Any, ...]
"""The shape, strides and dtype of a tensor."""


@dataclass(frozen=True)
class Launch:
    """One launch: the indices of the members that it rotates, its grid, and the kernel's other arguments."""

    members: tuple[int, int]
    programs: int
    numbers: tuple[int, ...]
    constants: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """How to compute rotary embedding for tensors of given shapes.

    Attributes:
        results: the number of elements, shape, strides and dtype of each result.
        direct: for each result, whether the kernel can write to it; otherwise it is copied from a contiguous buffer.
        launches: the launches.
    """

    results: tuple[tuple[int, torch.Size, tuple[int, ...], torch.dtype], ...]
    direct: tuple[bool, ...]
    launches: tuple[Launch, ...]


@lru_cache(maxsize=4096)
def plan(
    max_heads: int,
    adjoint: bool,
    x: tuple[Shape, ...],
    dtypes: tuple[torch.dtype, ...],
    tables: tuple[Shape, Shape],
    layout: str,
    rotary_dim: int,
    compute_dtype: torch.dtype,
) -> Plan:
    """Return the plan for members `x` with results in `dtypes`, with heads in tiles of at most `max_heads`."""
    cos, sin = map(_empty, tables)
    inputs, results = [_empty(shape) for shape in x], []
    for each, dtype in zip(inputs, dtypes, strict=True):  # the strides of the PyTorch implementation's results
        arguments = (cos, sin, layout, rotary_dim, compute_dtype, dtype)
        results.append(op.gradient(each, *arguments) if adjoint else op.forward(each, *arguments)[0])
    buffers = [last_dim_contiguous(y) for y in results]
    geometry = _Geometry(last_dim_contiguous(cos), last_dim_contiguous(sin), max_heads)
    launches, first = [], 0
    while first < len(x):
        last = first + 1 if geometry.fit_together(inputs[first : first + 2]) else first
        pairs = [(last_dim_contiguous(inputs[i]), buffers[i]) for i in range(first, last + 1)]
        programs, numbers, constants = geometry.arguments(pairs, rotary_dim // 2)
        constants |= _layout_constants(adjoint, layout, compute_dtype)
        launches.append(Launch((first, last), programs, numbers, constants))
        first = last + 1
    return Plan(
        tuple((y.numel(), y.shape, y.stride(), y.dtype) for y in results),
        tuple(y is buffer for y, buffer in zip(results, buffers, strict=True)),
        tuple(launches),
    )


def _layout_constants(adjoint: bool, layout: str, compute_dtype: torch.dtype) -> dict[str, Any]:
    adjacent = layout == "pairs"
    return {
        "ADJOINT": adjoint,
        "NEGATE": adjoint != (layout == "flipped"),
        "ADJACENT_IN": adjacent or (layout == "interleaved" and not adjoint),
        "ADJACENT_OUT": adjacent or (layout == "interleaved" and adjoint),
        "TABLE": "once" if layout == "interleaved" else "adjacent" if adjacent else "apart",
        "ROUNDED": tl.float32 if adjoint else TL_DTYPES[compute_dtype],
    }


class _Geometry:
    """Arranges sizes and strides as (batch, heads, positions), such that the angles do not depend on the head if
    possible."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor, max_heads: int) -> None:
        self._max_heads = max_heads
        self._axes = (0, 1, 2)
        self._tables = [
            self._arranged([0 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True)], 0)
            for t in (cos, sin)
        ]
        (_, cos_head, cos_position), (_, sin_head, sin_position) = self._tables
        if (cos_head or sin_head) and not (cos_position or sin_position):  # x is (batch, positions, heads, D)
            self._axes = (0, 2, 1)
            self._tables = [(batch, position, head) for batch, head, position in self._tables]

    def _arranged(self, sizes: Sequence[int], missing: int) -> tuple[int, ...]:
        padded = [missing] * (4 - len(sizes)) + list(sizes)
        return tuple(padded[axis] for axis in self._axes)

    def fit_together(self, x: Sequence[torch.Tensor]) -> bool:
        """Return whether these are two tensors that differ only in the number of heads."""
        shapes = [(*self._arranged(each.shape, 1)[::2], each.shape[-1]) for each in x]
        return len(shapes) == 2 and shapes[0] == shapes[1]

    def arguments(
        self, members: Sequence[tuple[torch.Tensor, torch.Tensor]], P: int
    ) -> tuple[int, tuple[int, ...], dict[str, Any]]:
        """Return the grid, and the kernel's integers and constants, for one or two pairs of x and y."""
        sizes = [self._arranged(x.shape, 1) for x, _ in members]
        inputs = [self._arranged(x.stride(), 0) for x, _ in members]
        outputs = [self._arranged(y.stride(), 0) for _, y in members]
        (B, H0, S), H1 = sizes[0], sizes[-1][1]
        block_s, block_h, block_p = tile(P, math.gcd(H0, H1), self._max_heads)
        tiles0 = cdiv(H0, block_h)
        tiles = tiles0 + (cdiv(H1, block_h) if len(members) == 2 else 0)
        groups = (inputs[0], inputs[-1], outputs[0], outputs[-1], *self._tables)
        numbers = (B * S, S, H0, H1, tiles0, tiles, *(stride for group in groups for stride in group))
        rest = members[0][0].shape[-1] - 2 * P
        constants = {
            "TWO": len(members) == 2,
            "PER_HEAD": any(head for _, head, _ in self._tables),
            "P": P,
            "REST": rest,
            "BLOCK_S": block_s,
            "BLOCK_H": block_h,
            "BLOCK_P": block_p,
            "BLOCK_REST": power_of_two(max(rest, 1)),
            "num_warps": WARPS,
        }
        return cdiv(B * S, block_s) * tiles, numbers, constants


def tile(P: int, H: int, max_heads: int) -> tuple[int, int, int]:
    """Return the positions, heads and pairs of a program's tile; the heads are a power of two that divides H."""
    block_p = power_of_two(P)
    return max(1, WARPS * PAIRS // block_p), min(H & -H, max_heads), block_p


def shape_of(t: torch.Tensor) -> Shape:
    return t.shape, t.stride(), t.dtype


def _empty(shape: Shape) -> torch.Tensor:
    return torch.empty_strided(shape[0], shape[1], dtype=shape[2], device="meta")


def last_dim_contiguous(t: torch.Tensor) -> torch.Tensor:
    """Return `t`, copied unless its last dimension has stride 1."""
    return t if t.stride(-1) == 1 else t.contiguous()
