"""Experts with LoRA to test the grouped ops with, some without tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import strategies as st
from op_cases import Arguments, complete, f64
from op_precision import sizes, tensors

from fastlora.kernels.ops import lora_experts

ENDS = [3, 3, 7]
"""The second of three experts has no tokens."""


def arguments(
    dtype: torch.dtype,
    n: int,
    k: int,
    rank: int,
    ends: list[int] = ENDS,
    rest: int = 0,
    out_first: bool = True,
    zero_rest: bool = True,
    offs_dtype: torch.dtype = torch.int32,
) -> Arguments:
    """Return arguments of `lora_experts`, B not zero, scaled so that products are of the size of their inputs."""

    def randn(*shape: int, inner: int = 1) -> torch.Tensor:
        return (torch.randn(shape, dtype=f64) * inner**-0.5).to(dtype)

    count = len(ends)
    weight, a, b = randn(count, n, k, inner=k), randn(count, rank, k, inner=k), randn(count, n, rank, inner=rank)
    matrices = {"weight": weight, "left": b, "right": a}
    if not out_first:
        matrices = {name: m.mT.contiguous() for name, m in zip(matrices, (weight, a, b), strict=True)}
    options = {"scaling": 2.83, "out_first": out_first, "zero_rest": zero_rest}
    return {"x": randn(ends[-1] + rest, k), **matrices, "offs": torch.tensor(ends, dtype=offs_dtype), **options}


SMALL = {"n": 4, "k": 5, "rank": 2}
LAYOUTS = pytest.mark.parametrize("out_first", [True, False], ids=["out first", "in first"])


@st.composite
def layers(draw: st.DrawFn, dtype: torch.dtype) -> Arguments:
    """Draw up to four experts, some without tokens, and tokens without an expert."""
    out_first = draw(st.booleans())
    n, k, rank = (draw(sizes) for _ in range(3))
    counts = draw(st.lists(st.sampled_from([0, 1, 2, 5, 13]), min_size=1, max_size=4).filter(any))
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    rest = draw(st.sampled_from([0, 3]))

    def matrix(rows: int, cols: int) -> torch.Tensor:
        return draw(tensors((len(counts), rows, cols) if out_first else (len(counts), cols, rows), dtype))

    weight, a, b = matrix(n, k), matrix(rank, k), matrix(n, rank)
    left, right = (b, a) if out_first else (a, b)
    drawn = {"x": draw(tensors((sum(counts) + rest, k), dtype)), "weight": weight, "left": left, "right": right}
    options = {"scaling": draw(st.sampled_from([1.0, 0.5, 2.83, 16.0])), "out_first": out_first}
    return complete(lora_experts, {**drawn, "offs": ends, **options, "zero_rest": True})
