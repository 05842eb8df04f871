"""Which tile `matmul.py` computes a product with, and whether that is faster than cuBLAS, by times measured once."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from fastlora.kernels.core.devices import Gpu, capability, processors
from fastlora.kernels.triton.host.launch import cdiv

FEWEST_ROWS = 64
"""Below, tiles are mostly padding, and cuBLAS splits the summed dimension."""


class Tile(NamedTuple):
    """One shape of tile: its edges, the kernel's options, and what one wave of such tiles costs relative to others."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    wave: float


TILES = {
    # wave: microseconds for one tile per processor and 4096 summed elements, H200, bfloat16
    (9, 0): (
        Tile(128, 256, 64, warps=8, stages=4, wave=49.0),
        Tile(128, 128, 64, warps=4, stages=5, wave=25.0),
        Tile(64, 128, 128, warps=4, stages=4, wave=17.0),
        Tile(64, 64, 128, warps=4, stages=6, wave=13.0),
    ),
}
"""Measured tiles by compute capability; where there are none, cuBLAS is the better choice."""


class Library(NamedTuple):
    """What cuBLAS was measured to do in a microsecond: its products' operations and bytes, the bytes of a product that
    is added onto its output; and the microseconds that any call takes."""

    operations: float
    bytes: float
    added_bytes: float
    call: float


LIBRARY = {(9, 0): Library(operations=690e6, bytes=3.2e6, added_bytes=4.2e6, call=2.0)}

WIDE_OUT = Tile(128, 128, 64, warps=4, stages=4, wave=1.0)
"""For an output of 32 bits: smaller, because the output's tile passes through shared memory."""


@lru_cache(maxsize=1024)
def is_faster(M: int, N: int, K: int, added: int, gpu: Gpu) -> bool | str:
    """Return True if a sum of `added` + 1 products, (M, K) @ (K, N) in all, beats cuBLAS here, else why not."""
    if M < FEWEST_ROWS:
        return f"fewer than {FEWEST_ROWS} rows"
    if _expected(M, N, K, gpu) > _library_microseconds(M, N, K, added, gpu.capability):
        return "cuBLAS is faster: the tiles leave the last wave too empty"
    return True


def measured(device: torch.device) -> bool:
    """Return whether the kernels were tuned and timed for such a device."""
    return capability(device) in TILES


def _expected(M: int, N: int, K: int, gpu: Gpu) -> float:
    """Return the microseconds that (M, K) @ (K, N) should take here, by the measured waves of tiles."""
    return _microseconds(best(M, N, gpu.processors, gpu.capability), M, N, K, gpu.processors)


def _microseconds(tile: Tile, M: int, N: int, K: int, programs: int) -> float:
    return cdiv(cdiv(M, tile.m) * cdiv(N, tile.n), programs) * tile.wave * K / 4096 + 2


def _library_microseconds(M: int, N: int, K: int, added: int, gpu: tuple[int, int]) -> float:
    """Return cuBLAS's time for a product and `added` further ones, each of which reads and writes the output again."""
    rates = LIBRARY[gpu]
    product = max(2 * M * N * K / rates.operations, 2 * (M * K + N * K + M * N) / rates.bytes)
    return product + rates.call + added * (4 * M * N / rates.added_bytes + rates.call)


@lru_cache(maxsize=1024)
def best(M: int, N: int, programs: int, gpu: tuple[int, int]) -> Tile:
    """Return the tile that fills the GPU in the cheapest waves."""
    return min(TILES[gpu], key=lambda tile: _microseconds(tile, M, N, 4096, programs))


def tile_of(out: torch.Tensor) -> Tile:
    """Return the tile for an output."""
    if out.element_size() > 2:
        return WIDE_OUT
    M, N = out.shape
    return best(M, N, processors(out.device), capability(out.device))
