"""What to launch for rotary embeddings of certain shapes, and into what memory.

Working this out takes longer than a launch, and a model asks again and again for a few shapes: it is looked up.
"""

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
PAIRS, HEADS, WARPS = 256, 4, 2
OLDER_HEADS = 2
"""Pairs that a warp turns at a time, 8 for each thread; the most heads of a tile, of which four spill on GPUs before
Hopper; warps of a program.

All pairs of a warp belong to one head, so a thread has the same pairs of the same position in every head, and the
angles that it loads for them are those that it needs."""

Shape = tuple[Any, ...]
"""Shape, strides and dtype of a tensor."""


@dataclass(frozen=True)
class Launch:
    """One launch: which of the members it turns, its grid, and the kernel's other arguments."""

    members: tuple[int, int]
    programs: int
    numbers: tuple[int, ...]
    constants: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What to do for tensors of certain shapes.

    `results` has the size, shape, strides and dtype of each; `written` says which of them kernels can write to as they
    are, with the entries of a head side by side.
    """

    results: tuple[tuple[int, torch.Size, tuple[int, ...], torch.dtype], ...]
    written: tuple[bool, ...]
    launches: tuple[Launch, ...]


@lru_cache(maxsize=4096)
def plan(
    most_heads: int,
    back: bool,
    x: tuple[Shape, ...],
    dtypes: tuple[torch.dtype, ...],
    tables: tuple[Shape, Shape],
    layout: str,
    rotary_dim: int,
    compute_dtype: torch.dtype,
) -> Plan:
    cos, sin = map(_empty, tables)
    inputs, results = [_empty(shape) for shape in x], []
    for each, dtype in zip(inputs, dtypes, strict=True):  # laid out as by the PyTorch form: run without content
        how = (cos, sin, layout, rotary_dim, compute_dtype, dtype)
        results.append(op.gradient(each, *how) if back else op.forward(each, *how)[0])
    written = [inner(y) for y in results]
    geometry = _Geometry(inner(cos), inner(sin), most_heads)
    launches, first = [], 0
    while first < len(x):
        last = first + 1 if geometry.fit_together(inputs[first : first + 2]) else first
        pairs = [(inner(inputs[i]), written[i]) for i in range(first, last + 1)]
        programs, numbers, constants = geometry.arguments(pairs, rotary_dim // 2)
        constants |= _direction(back, layout, compute_dtype)
        launches.append(Launch((first, last), programs, numbers, constants))
        first = last + 1
    return Plan(
        tuple((y.numel(), y.shape, y.stride(), y.dtype) for y in results),
        tuple(y is w for y, w in zip(results, written, strict=True)),
        tuple(launches),
    )


def _direction(back: bool, layout: str, compute_dtype: torch.dtype) -> dict[str, Any]:
    adjacent = layout == "pairs"
    return {
        "BACK": back,
        "MINUS": back != (layout == "flipped"),
        "IN": adjacent or (layout == "interleaved" and not back),
        "OUT": adjacent or (layout == "interleaved" and back),
        "TABLE": "once" if layout == "interleaved" else "adjacent" if adjacent else "apart",
        "ROUNDED": tl.float32 if back else TL_DTYPES[compute_dtype],
    }


class _Geometry:
    """Sizes and strides as (batch, heads, positions), where the angles of a position are those of all heads."""

    def __init__(self, cos: torch.Tensor, sin: torch.Tensor, most_heads: int) -> None:
        self._most_heads = most_heads
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
        """Whether the first two differ in nothing but the number of heads."""
        shapes = [(*self._arranged(each.shape, 1)[::2], each.shape[-1]) for each in x]
        return len(shapes) == 2 and shapes[0] == shapes[1]

    def arguments(
        self, members: Sequence[tuple[torch.Tensor, torch.Tensor]], P: int
    ) -> tuple[int, tuple[int, ...], dict[str, Any]]:
        """The grid, and the kernel's numbers and constants, for one or two pairs of x and y."""
        sizes = [self._arranged(x.shape, 1) for x, _ in members]
        inputs = [self._arranged(x.stride(), 0) for x, _ in members]
        outputs = [self._arranged(y.stride(), 0) for _, y in members]
        (B, H0, S), H1 = sizes[0], sizes[-1][1]
        block_s, block_h, block_p = tile(P, math.gcd(H0, H1), self._most_heads)
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


def tile(P: int, H: int, most_heads: int) -> tuple[int, int, int]:
    """Positions, heads and pairs of a program's tile; a power of two of the heads, so that none is empty."""
    block_p = power_of_two(P)
    return max(1, WARPS * PAIRS // block_p), min(H & -H, most_heads), block_p


def shape_of(t: torch.Tensor) -> Shape:
    return t.shape, t.stride(), t.dtype


def _empty(shape: Shape) -> torch.Tensor:
    return torch.empty_strided(shape[0], shape[1], dtype=shape[2], device="meta")


def inner(t: torch.Tensor) -> torch.Tensor:
    """`t` with the entries of a head side by side."""
    return t if t.stride(-1) == 1 else t.contiguous()
