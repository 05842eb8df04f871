"""Dropout from a seed: `kernels/formulas/dropout.py` has the formulas.

A program computes one Philox counter, which gives four random words, for each four elements. Recomputing the mask costs
a pass over the activation and no memory; kernels that hold whole rows anyway apply `row_factors` and save the pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import FLOAT_DTYPES, supported
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.formulas import dropout as op
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import cdiv, empty

BLOCK = 2048
"""Elements of a program: 16 per thread."""


@triton.jit
def _philox(seed, counter):
    """Return the four random words of each int64 counter."""
    low, high = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    return tl.philox(seed, low, high, zero, zero, n_rounds=10)


@triton.jit
def _interleave_words(words):
    """Stack the four words of each counter in order, as two new trailing dimensions of size two."""
    first, second, third, fourth = words
    return tl.join(tl.join(first, third), tl.join(second, fourth))


@triton.jit
def random_words(seed, counter):
    """Return the random words of 4 n consecutive elements, for a block of n consecutive counters."""
    return _interleave_words(_philox(seed, counter)).reshape(4 * counter.shape[0])


@triton.jit
def row_factors(
    row, H, seed_ptr, threshold, scale, MULTIPLE_OF_4: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr
):
    """Return the dropout factors (BLOCK_T, BLOCK_H) of rows of H elements, for int64 row indices (BLOCK_T, 1).

    MULTIPLE_OF_4: H is a multiple of four, so no two rows share a counter, and each counter is computed only once.
    """
    seed = tl.load(seed_ptr)
    if MULTIPLE_OF_4:
        counter = row * (H // 4) + tl.arange(0, BLOCK_H // 4)[None, :]
        words = _interleave_words(_philox(seed, counter)).reshape(BLOCK_T, BLOCK_H)
    else:
        i = row * H + tl.arange(0, BLOCK_H)[None, :]
        first, second, third, fourth = _philox(seed, i >> 2)
        even, odd = tl.where(i & 2 == 0, first, third), tl.where(i & 2 == 0, second, fourth)
        words = tl.where(i & 1 == 0, even, odd)
    return tl.where(words.to(tl.int64) >= threshold, scale, 0.0)


@precompile.kernel(do_not_specialize=["threshold", "scale"])
def dropout_kernel(x_ptr, base_ptr, seed_ptr, out_ptr, size, threshold, scale, BLOCK: tl.constexpr):
    """out = x * (scale if word >= threshold else 0) (+ base), for BLOCK elements.

    `size` is specialized: if it is a multiple of 16, bounds masks are uniform over vectors, so accesses are vectorized.
    """
    block = tl.program_id(0).to(tl.int64)
    words = random_words(tl.load(seed_ptr), block * (BLOCK // 4) + tl.arange(0, BLOCK // 4))
    i = block * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    x = tl.load(x_ptr + i, mask=mask, other=0.0).to(tl.float32)
    out = x * tl.where(words.to(tl.int64) >= threshold, scale, 0.0)
    if base_ptr is not None:
        out += tl.load(base_ptr + i, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, out.to(out_ptr.dtype.element_ty), mask=mask)


def dropout_arguments(
    x: torch.Tensor, seed: torch.Tensor | None, p: float | None
) -> tuple[torch.Tensor | None, int, float, bool]:
    """Return the kernel arguments seed_ptr, threshold, scale and MULTIPLE_OF_4 for `row_factors` of the rows of `x`;
    without a seed, seed_ptr is None."""
    op.check_argument(seed, p)
    if seed is None or p is None:
        return None, 0, 1.0, False
    op.check(x, None, seed, p)
    return seed, op.threshold(p), op.inverse(p), x.shape[-1] % 4 == 0


def run(
    x: torch.Tensor,
    seed: torch.Tensor,
    p: float,
    dtype: torch.dtype,
    base: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return dropout of x (+ base) in `dtype`, contiguous; written to `out` if given, which may be `base` or x if these
    are contiguous."""
    op.check(x, base, seed, p)
    if out is None:
        out = empty(*x.shape, like=x, dtype=dtype)
    size = x.numel()
    if size:
        dropout_kernel[(cdiv(size, BLOCK),)](
            x.contiguous(), None if base is None else base.contiguous(), seed, out,
            size, op.threshold(p), op.inverse(p), BLOCK,
            num_warps=4, enable_fp_fusion=False,  # round the product before the sum, like the PyTorch implementation
        )  # fmt: skip
    return out


def serves(x: torch.Tensor, base: torch.Tensor | None, out_dtype: torch.dtype, **_: Any) -> bool:
    return supported(x, base) and out_dtype in FLOAT_DTYPES


def forward(
    x: torch.Tensor, base: torch.Tensor | None, seed: torch.Tensor, p: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor]:
    return (run(x, seed, p, out_dtype, base),)


def serves_backward(grads: list[torch.Tensor], x_dtype: torch.dtype, **_: Any) -> bool:
    return supported(*grads) and x_dtype in FLOAT_DTYPES


def backward(
    wanted: Wanted, grads: list[torch.Tensor], seed: torch.Tensor, x_dtype: torch.dtype, p: float, **_: Any
) -> Gradients:
    return {"x": run(grads[0], seed, p, x_dtype)} if wanted["x"] else {}


op.dropout.implementation(
    "triton",
    forward=forward,
    backward=backward,
    serves=serves,
    serves_backward=serves_backward,
)
