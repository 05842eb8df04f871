"""Tile selection for `matmul.py`, and a cost model, from measured times, of when it beats cuBLAS."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from fastlora.kernels.core.devices import Gpu, capability, processors
from fastlora.kernels.triton.host.launch import cdiv

MIN_ROWS = 64
"""Below this, tiles are mostly padding, and cuBLAS uses split-K."""


class Tile(NamedTuple):
    """A tile shape, the kernel's launch options, and the relative cost of one wave of such tiles."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    wave: float


TILES = {
    # wave: microseconds of one tile per SM with K = 4096, H200, bfloat16
    (9, 0): (
        Tile(128, 256, 64, warps=8, stages=4, wave=49.0),
        Tile(128, 128, 64, warps=4, stages=5, wave=25.0),
        Tile(64, 128, 128, warps=4, stages=4, wave=17.0),
        Tile(64, 64, 128, warps=4, stages=6, wave=13.0),
    ),
}
"""Measured tiles by compute capability; other GPUs use cuBLAS."""


class CublasRates(NamedTuple):
    """Measured throughput of cuBLAS per microsecond: floating-point operations and bytes of a product, and bytes of a
    product that is added onto its output; and the microseconds of overhead of any call."""

    flops: float
    bytes: float
    added_bytes: float
    call: float


CUBLAS = {(9, 0): CublasRates(flops=690e6, bytes=3.2e6, added_bytes=4.2e6, call=2.0)}

FLOAT32_OUT = Tile(128, 128, 64, warps=4, stages=4, wave=1.0)
"""The tile for 32-bit outputs: smaller, because the output's tile is staged in shared memory."""


@lru_cache(maxsize=1024)
def is_faster(M: int, N: int, K: int, added: int, gpu: Gpu) -> bool | str:
    """Return True if a sum of `added` + 1 products, whose K sum to `K`, beats cuBLAS, otherwise the reason why not."""
    if M < MIN_ROWS:
        return f"fewer than {MIN_ROWS} rows"
    if _expected(M, N, K, gpu) > _cublas_microseconds(M, N, K, added, gpu.capability):
        return "cuBLAS is faster: the tiles leave the last wave too empty"
    return True


def is_tuned(device: torch.device) -> bool:
    """Return whether the kernels were tuned for the compute capability of this device."""
    return capability(device) in TILES


def _expected(M: int, N: int, K: int, gpu: Gpu) -> float:
    """Return the expected microseconds of (M, K) @ (K, N) with the best tile."""
    return _microseconds(best(M, N, gpu.processors, gpu.capability), M, N, K, gpu.processors)


def _microseconds(tile: Tile, M: int, N: int, K: int, programs: int) -> float:
    return cdiv(cdiv(M, tile.m) * cdiv(N, tile.n), programs) * tile.wave * K / 4096 + 2


def _cublas_microseconds(M: int, N: int, K: int, added: int, gpu: tuple[int, int]) -> float:
    """Return cuBLAS's time for a product and `added` further ones, each of which reads and writes the output again."""
    rates = CUBLAS[gpu]
    product = max(2 * M * N * K / rates.flops, 2 * (M * K + N * K + M * N) / rates.bytes)
    return product + rates.call + added * (4 * M * N / rates.added_bytes + rates.call)


@lru_cache(maxsize=1024)
def best(M: int, N: int, programs: int, gpu: tuple[int, int]) -> Tile:
    """Return the tile with the shortest expected time."""
    return min(TILES[gpu], key=lambda tile: _microseconds(tile, M, N, 4096, programs))


def tile_of(out: torch.Tensor) -> Tile:
    """Return the tile for an output matrix."""
    if out.element_size() > 2:
        return FLOAT32_OUT
    M, N = out.shape
    return best(M, N, processors(out.device), capability(out.device))
