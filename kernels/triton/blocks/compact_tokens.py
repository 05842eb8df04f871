"""Compaction of the tokens whose labels are not ignored, on the device: the host never synchronizes on their count."""

from __future__ import annotations

import torch
import triton.language as tl

from fastlora.compat.calls import assert_async
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import cdiv, empty, power_of_two


@precompile.kernel(do_not_specialize=["T", "V", "chunk", "chunks", "ignore_index"])
def rank_kernel(
    labels_ptr, ranks_ptr, remaining_ptr, count_ptr, valid_ptr,
    T, V, chunk, chunks, ignore_index, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the kept labels up to each one, in total and in each chunk, and check that all kept labels are in [0, V).

    A single program handles all T labels, which take little time next to the products that follow.
    """
    offsets = tl.arange(0, BLOCK)
    count = tl.zeros((), tl.int32)
    out_of_range = tl.zeros((), tl.int32)
    for start in range(0, T, BLOCK):
        at = start + offsets
        labels = tl.load(labels_ptr + at, mask=at < T, other=ignore_index)
        kept = labels != ignore_index
        tl.store(ranks_ptr + at, count + tl.cumsum(kept.to(tl.int32), axis=0), mask=at < T)
        count += tl.sum(kept.to(tl.int32), axis=0)
        out_of_range += tl.sum((kept & ((labels < 0) | (labels >= V))).to(tl.int32), axis=0)
    tl.store(count_ptr, count)
    tl.store(valid_ptr, (out_of_range == 0).to(tl.int32))
    for start in range(0, chunks, BLOCK):
        at = start + offsets
        tl.store(remaining_ptr + at, tl.minimum(tl.maximum(count - at * chunk, 0), chunk), mask=at < chunks)


@precompile.kernel(do_not_specialize=["ignore_index"])
def gather_kernel(
    x_ptr, labels_ptr, ranks_ptr, count_ptr, rows_ptr, order_ptr,
    H, x_stride, ignore_index, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Store a token's row of x at its position in the compacted order, zeros if it is ignored, and its index there."""
    token = tl.program_id(0).to(tl.int64)
    rank = tl.load(ranks_ptr + token).to(tl.int64)  # kept tokens up to here, this one included
    kept = tl.load(labels_ptr + token) != ignore_index
    row = tl.where(kept, rank - 1, tl.load(count_ptr) + token - rank)
    tl.store(order_ptr + row, token)
    for start in range(0, H, BLOCK_H):
        cols = start + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + token * x_stride + cols, mask=(cols < H) & kept, other=0.0).to(tl.float32)
        tl.store(rows_ptr + row * H + cols, x.to(rows_ptr.dtype.element_ty), mask=cols < H)


@precompile.kernel()
def scatter_kernel(rows_ptr, order_ptr, count_ptr, out_ptr, H, BLOCK_H: tl.constexpr):
    """Copy a compacted row back to its token's position; store zeros for an ignored token."""
    row = tl.program_id(0).to(tl.int64)
    kept = row < tl.load(count_ptr)
    token = tl.load(order_ptr + row)
    for first in range(0, H, BLOCK_H):
        cols = first + tl.arange(0, BLOCK_H)
        t = tl.load(rows_ptr + row * H + cols, mask=(cols < H) & kept, other=0.0)
        tl.store(out_ptr + token * H + cols, t, mask=cols < H)


def check_labels(valid: torch.Tensor) -> None:
    """Raise IndexError if a label is out of range; on a GPU by a device-side assertion, like PyTorch's own loss."""
    if valid.device.type != "cpu":
        assert_async(valid, "linear_cross_entropy: a label is out of bounds")
    elif not valid:
        raise IndexError("linear_cross_entropy: a label is out of bounds")


class CompactedTokens:
    """The tokens of x (T, H) with kept tokens first, each group in its original order.

    Attributes:
        rows: (T, H) in `dtype`, zeros for ignored tokens.
        order: (T,) int64, the token index of each row.
        remaining: (chunks,) int32, the number of kept rows in each chunk of `chunk` rows.

    Raises:
        IndexError: if a label is out of range.
    """

    def __init__(
        self, x: torch.Tensor, labels: torch.Tensor, ignore_index: int, vocabulary: int, dtype: torch.dtype, chunk: int
    ):
        x = x if x.stride(1) == 1 else x.contiguous()
        (T, H), chunks = x.shape, cdiv(x.shape[0], chunk)
        ranks, self.remaining = empty(T, like=x, dtype=torch.int32), empty(chunks, like=x, dtype=torch.int32)
        self._count, valid = empty(1, like=x, dtype=torch.int32), empty(1, like=x, dtype=torch.int32)
        rank_kernel[(1,)](
            labels, ranks, self.remaining, self._count, valid,
            T, vocabulary, chunk, chunks, ignore_index, BLOCK=4096, num_warps=16,
        )  # fmt: skip
        check_labels(valid)
        self.rows, self.order = empty(T, H, like=x, dtype=dtype), empty(T, like=x, dtype=torch.int64)
        self._block = min(4096, power_of_two(H))
        gather_kernel[(T,)](
            x, labels, ranks, self._count, self.rows, self.order, H, x.stride(0), ignore_index, BLOCK_H=self._block
        )

    def scatter(self) -> torch.Tensor:
        """Return the current contents of `rows` as (T, H) in token order, with zeros for ignored tokens."""
        T, H = self.rows.shape
        out = empty(T, H, like=self.rows)
        scatter_kernel[(T,)](self.rows, self.order, self._count, out, H, BLOCK_H=self._block)
        return out
