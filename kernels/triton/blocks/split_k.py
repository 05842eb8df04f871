"""A product of few tiles that sum for long, with its sums cut into slices:  out[:count] = left[:count] @ right.

The input gradient of a language model's head is one: a chunk of tokens by the hidden size has fewer tiles than the GPU
has room for, or a last wave of them that is mostly idle, while every tile sums over the vocabulary.  Slices of the sum
are more and shorter pieces of work, which fill the waves; their sums are kept in float32, and a second kernel adds them
in order, so that two runs give equal bits.  All tiles of a slice come before the next slice: programs that run together
read the same rows of `right`, which is what the cache is for.

Tiles, operands and layouts are those of `matmul.py`.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import capability, processors
from fastlora.kernels.triton.blocks import matmul, matmul_tiles
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import allocate, cdiv

MOST_SLICES = 8
PART_BYTES = 3.0e6
"""Bytes of parts that are written or read in a microsecond, on an H100."""
LAUNCH = 5.0
"""Microseconds of the second kernel beside its bytes."""


@triton.jit
def _store_quarters(out, t, m, n, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """out[m:, n:] = t, WIDTH columns of it at a time, of which there are four times as many: float32 takes much shared
    memory on its way."""
    left, right = t.reshape(BLOCK_M, 2, 2 * WIDTH).permute(0, 2, 1).split()
    first, second = left.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1).split()
    third, fourth = right.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1).split()
    out.store([m, n], first)
    out.store([m, n + WIDTH], second)
    out.store([m, n + 2 * WIDTH], third)
    out.store([m, n + 3 * WIDTH], fourth)


@precompile.kernel(do_not_specialize=["M", "height"])
def slice_kernel(
    parts, left, right, count_ptr, M, N, K, height, slices, RIGHT_T: tl.constexpr,
    PROGRAMS: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """parts (slices * height, N): left @ right over each slice of the summed dimension; every PROGRAMS-th tile."""
    M = min(M, tl.load(count_ptr).to(tl.int32))
    rows = tl.cdiv(M, BLOCK_M)
    cols = tl.cdiv(N, BLOCK_N)
    tiles = rows * cols
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), slices)
    for piece in tl.range(tl.program_id(0), tiles * slices, PROGRAMS, flatten=True):
        one = piece // tiles
        row, col = matmul._place(piece - one * tiles, rows, cols, GROUP_M)
        m = row * BLOCK_M
        n = col * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(0, steps):  # beyond K the copy engine gives zeros
            k = (one * steps + step) * BLOCK_K
            a = left.load([m, k])
            b = right.load([n, k]).T if RIGHT_T else right.load([k, n])
            acc = tl.dot(a, b, acc)
        _store_quarters(parts, acc, one * height + m, n, BLOCK_M, BLOCK_N // 4)


@precompile.kernel(do_not_specialize=["M", "height"])
def add_slices_kernel(
    parts_ptr, out_ptr, count_ptr, M, N, height, slices, parts_stride, out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[:count] = the sum of the slices, in order, rounded."""
    M = min(M, tl.load(count_ptr).to(tl.int32))
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (row < M) & (col < N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for one in tl.range(0, slices):
        acc += tl.load(parts_ptr + (one * height + row) * parts_stride + col, mask=mask, other=0.0)
    tl.store(out_ptr + row * out_stride + col, acc.to(out_ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=1024)
def _plan(M: int, N: int, K: int, programs: int, gpu: tuple[int, int]) -> tuple[int, float]:
    tile = matmul_tiles.TILES[gpu][0]
    tiles = cdiv(M, tile.m) * cdiv(N, tile.n)

    def microseconds(slices: int) -> float:
        product = cdiv(tiles * slices, programs) * tile.wave * K / slices / 4096
        return product + (8 * slices * M * N / PART_BYTES + LAUNCH if slices > 1 else 0.0)

    return min(((slices, microseconds(slices)) for slices in range(1, MOST_SLICES + 1)), key=lambda plan: plan[1])


def plan(M: int, N: int, K: int, device: torch.device) -> tuple[int, float]:
    """Into how many slices to cut (M, K) @ (K, N), one if that does not pay, and the microseconds it should take."""
    return _plan(M, N, K, processors(device), capability(device))


def limited_rows(
    left: torch.Tensor, right: torch.Tensor, count: torch.Tensor, out: torch.Tensor, slices: int
) -> torch.Tensor:
    """As `matmul.limited_rows`, for a `left` (M, K) whose rows are contiguous, in slices of the sum."""
    (M, N), K = out.shape, left.shape[1]
    if M == 0:
        return out
    tile, programs = matmul_tiles.TILES[capability(out.device)][0], processors(out.device)
    height, right_t = cdiv(M, tile.m) * tile.m, right.stride(1) != 1
    parts = allocate((slices * height, cdiv(N, 4) * 4), torch.float32, out.device)
    slice_kernel[(min(programs, cdiv(M, tile.m) * cdiv(N, tile.n) * slices),)](
        matmul.describe(parts, tile.m, tile.n // 4), matmul.describe(left, tile.m, tile.k),
        matmul.describe(right.t(), tile.n, tile.k) if right_t else matmul.describe(right, tile.k, tile.n),
        count, M, N, K, height, slices, RIGHT_T=right_t,
        PROGRAMS=programs, GROUP_M=matmul.GROUP_M, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    add_slices_kernel[(cdiv(M, 8), cdiv(N, 512))](
        parts, out, count, M, N, height, slices, parts.stride(0), out.stride(0), BLOCK_M=8, BLOCK_N=512, num_warps=4
    )
    return out
