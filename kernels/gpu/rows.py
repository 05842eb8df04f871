"""How the norms go over their rows: the tile of a program, and the programs that sum over all rows."""

from __future__ import annotations

from functools import cache

import torch

from fastlora.kernels.gpu.launch import empty, power_of_two, processors

WIDEST = 65536
"""The longest row that a program can hold in registers."""


@cache
def tile(H: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps: about 4,096 elements, 16 to 32 for each thread."""
    block_h = power_of_two(H)
    block_t = max(1, min(16, 2048 // block_h))
    return block_t, block_h, min(16, max(1, block_t * block_h // 1024))


def walkers(tiles: int, device: torch.device) -> int:
    """How many programs share the tiles where each sums over its own: as many as the GPU runs at a time."""
    return min(tiles, 4 * processors(device))


def shares(programs: int, wanted: bool, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """Memory for what each program sums of a parameter's gradient, if that is wanted."""
    if parameter is None or not wanted:
        return None
    return empty(programs, parameter.shape[0], like=parameter, dtype=torch.float32)


def total(shares: torch.Tensor | None, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """The gradient of the parameter, from its shares."""
    return None if shares is None or parameter is None else shares.sum(0).to(parameter.dtype)
