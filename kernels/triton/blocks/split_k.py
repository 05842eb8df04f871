"""Split-K matrix product, for outputs of few tiles with a large K:  out[:count] = left[:count] @ right.

An example is the input gradient of a language model's head: a chunk of tokens by the hidden size has too few tiles to
fill the GPU, or a mostly idle last wave of them, while K is the vocabulary.  Splitting K gives more and shorter pieces
of work, which fill the waves.  Partial sums are stored in float32, and a second kernel adds them in a fixed order, so
results are deterministic.  All tiles of a split come before those of the next one, so that programs that run together
read the same rows of `right`, which then stay in the L2 cache.

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

MAX_SPLITS = 8
PARTIALS_BANDWIDTH = 3.0e6
"""Bytes of partial sums that are written or read in a microsecond, on an H100."""
LAUNCH = 5.0
"""Microseconds of overhead of the second kernel."""


@triton.jit
def _store_quarters(out, t, m, n, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Store t to out[m:, n:] in four steps of WIDTH columns, since a float32 tile is staged in shared memory."""
    left, right = t.reshape(BLOCK_M, 2, 2 * WIDTH).permute(0, 2, 1).split()
    first, second = left.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1).split()
    third, fourth = right.reshape(BLOCK_M, 2, WIDTH).permute(0, 2, 1).split()
    out.store([m, n], first)
    out.store([m, n + WIDTH], second)
    out.store([m, n + 2 * WIDTH], third)
    out.store([m, n + 3 * WIDTH], fourth)


@precompile.kernel(do_not_specialize=["M", "height"])
def split_kernel(
    partials, left, right, count_ptr, M, N, K, height, splits, RIGHT_T: tl.constexpr,
    PROGRAMS: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """partials (splits * height, N) = left @ right, summed over each split of K, for every PROGRAMS-th tile."""
    M = min(M, tl.load(count_ptr).to(tl.int32))
    rows = tl.cdiv(M, BLOCK_M)
    cols = tl.cdiv(N, BLOCK_N)
    tiles = rows * cols
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), splits)
    for i in tl.range(tl.program_id(0), tiles * splits, PROGRAMS, flatten=True):
        split = i // tiles
        row, col = matmul.tile_position(i - split * tiles, rows, cols, GROUP_M)
        m = row * BLOCK_M
        n = col * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(0, steps):  # TMA pads with zeros beyond K
            k = (split * steps + step) * BLOCK_K
            a = left.load([m, k])
            b = right.load([n, k]).T if RIGHT_T else right.load([k, n])
            acc = tl.dot(a, b, acc)
        _store_quarters(partials, acc, split * height + m, n, BLOCK_M, BLOCK_N // 4)


@precompile.kernel(do_not_specialize=["M", "height"])
def add_splits_kernel(
    partials_ptr, out_ptr, count_ptr, M, N, height, splits, partials_stride, out_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[:count] = the sum of the partial sums, in order, rounded once."""
    M = min(M, tl.load(count_ptr).to(tl.int32))
    row = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (row < M) & (col < N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in tl.range(0, splits):
        acc += tl.load(partials_ptr + (split * height + row) * partials_stride + col, mask=mask, other=0.0)
    tl.store(out_ptr + row * out_stride + col, acc.to(out_ptr.dtype.element_ty), mask=mask)


@lru_cache(maxsize=1024)
def _plan(M: int, N: int, K: int, programs: int, gpu: tuple[int, int]) -> tuple[int, float]:
    tile = matmul_tiles.TILES[gpu][0]
    tiles = cdiv(M, tile.m) * cdiv(N, tile.n)

    def microseconds(splits: int) -> float:
        product = cdiv(tiles * splits, programs) * tile.wave * K / splits / 4096
        return product + (8 * splits * M * N / PARTIALS_BANDWIDTH + LAUNCH if splits > 1 else 0.0)

    return min(((splits, microseconds(splits)) for splits in range(1, MAX_SPLITS + 1)), key=lambda plan: plan[1])


def plan(M: int, N: int, K: int, device: torch.device) -> tuple[int, float]:
    """Return the best number of splits for (M, K) @ (K, N), 1 if splitting does not pay, and the expected
    microseconds."""
    return _plan(M, N, K, processors(device), capability(device))


def limited_rows(
    left: torch.Tensor, right: torch.Tensor, count: torch.Tensor, out: torch.Tensor, splits: int
) -> torch.Tensor:
    """Do what `matmul.limited_rows` does with K split; the rows of left (M, K) have to be contiguous."""
    (M, N), K = out.shape, left.shape[1]
    if M == 0:
        return out
    tile, programs = matmul_tiles.TILES[capability(out.device)][0], processors(out.device)
    height, right_t = cdiv(M, tile.m) * tile.m, right.stride(1) != 1
    partials = allocate((splits * height, cdiv(N, 4) * 4), torch.float32, out.device)
    split_kernel[(min(programs, cdiv(M, tile.m) * cdiv(N, tile.n) * splits),)](
        matmul.make_descriptor(partials, tile.m, tile.n // 4), matmul.make_descriptor(left, tile.m, tile.k),
        matmul.make_descriptor(right.t(), tile.n, tile.k) if right_t else matmul.make_descriptor(right, tile.k, tile.n),
        count, M, N, K, height, splits, RIGHT_T=right_t,
        PROGRAMS=programs, GROUP_M=matmul.GROUP_M, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    add_splits_kernel[(cdiv(M, 8), cdiv(N, 512))](
        partials, out, count, M, N, height, splits, partials.stride(0), out.stride(0),
        BLOCK_M=8, BLOCK_N=512, num_warps=4,
    )  # fmt: skip
    return out
