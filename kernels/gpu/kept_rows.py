"""Rows of tokens in another order, those that a loss keeps first, without the host knowing how many these are."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels.gpu.launch import empty, power_of_two


@triton.jit(do_not_specialize=["ignore_index"])
def gather_kernel(
    x_ptr, labels_ptr, ranks_ptr, count_ptr, rows_ptr, order_ptr,
    H, x_stride, ignore_index, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Where one token goes if the kept ones come first, and its row of x there: zeros if it is ignored."""
    token = tl.program_id(0).to(tl.int64)
    rank = tl.load(ranks_ptr + token)  # kept tokens up to here, this one included
    kept = tl.load(labels_ptr + token) != ignore_index
    row = tl.where(kept, rank - 1, tl.load(count_ptr) + token - rank)
    tl.store(order_ptr + row, token)
    for start in range(0, H, BLOCK_H):
        cols = start + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + token * x_stride + cols, mask=(cols < H) & kept, other=0.0).to(tl.float32)
        tl.store(rows_ptr + row * H + cols, x.to(rows_ptr.dtype.element_ty), mask=cols < H)


@triton.jit(do_not_specialize=["start"])
def scatter_kernel(part_ptr, order_ptr, remaining_ptr, dx_ptr, start, H, BLOCK_H: tl.constexpr):
    """One row of a chunk's dx to its token; zeros to an ignored one."""
    row = tl.program_id(0).to(tl.int64)
    kept = row < tl.load(remaining_ptr)
    token = tl.load(order_ptr + start + row)
    for first in range(0, H, BLOCK_H):
        cols = first + tl.arange(0, BLOCK_H)
        part = tl.load(part_ptr + row * H + cols, mask=(cols < H) & kept, other=0.0).to(tl.float32)
        tl.store(dx_ptr + token * H + cols, part.to(dx_ptr.dtype.element_ty), mask=cols < H)


class Kept:
    """The tokens of x (T, H), kept ones first, in the order they had.

    Attributes:
        rows: (T, H), zeros for ignored tokens.
        order: (T,), which token each row is.
        remaining: how many kept rows each chunk of `chunk` rows has.
    """

    def __init__(self, x: torch.Tensor, labels: torch.Tensor, ignore_index: int, dtype: torch.dtype, chunk: int):
        x = x if x.stride(1) == 1 else x.contiguous()
        (T, H), ranks = x.shape, (labels != ignore_index).cumsum(0)
        self.rows = empty(T, H, like=x, dtype=dtype)
        self.order = empty(T, like=x, dtype=torch.int64)
        self.remaining = (ranks[-1] - torch.arange(0, T, chunk, device=x.device)).clamp_(0, chunk)
        self._block = min(4096, power_of_two(H))
        gather_kernel[(T,)](
            x, labels, ranks, ranks[-1:], self.rows, self.order, H, x.stride(0), ignore_index, BLOCK_H=self._block
        )

    def put_back(self, part: torch.Tensor, start: int, remaining: torch.Tensor, out: torch.Tensor) -> None:
        """Rows of a chunk that begins at `start` to their tokens in `out` (T, H), zeros to its ignored tokens."""
        scatter_kernel[(part.shape[0],)](part, self.order, remaining, out, start, part.shape[1], BLOCK_H=self._block)
