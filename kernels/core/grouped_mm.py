"""Products of rows that are sorted by group, each by the matrix of its group, as the tokens of experts are.

    product:  y_t = s x_t W_e      for the rows t of group e, offs[e - 1] <= t < offs[e]
    outer:    G_e = s sum of l_t^T r_t over these rows; zero for a group without any

Rows from the last offset on are in no group: tokens of experts that live elsewhere. Nobody may read them. What is in
their place in a result is undefined, as in `torch._grouped_mm`'s, or zero where that is asked for.

On GPUs `torch._grouped_mm` makes all products of bfloat16 at once, without waiting for the offsets. It wants rows to
begin at multiples of 16 bytes. It has no float64 and, while tracing, nothing but bfloat16; everything else runs group
by group here, on a CPU in any dtype, on a GPU after one wait for the offsets in each forward and backward.

Shapes: x (T, K), W (E, K, N), y (T, N), l (T, M), r (T, N), G (E, M, N), offs (E,) of integers.
Source: first principles.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from fastlora.compat.calls import is_fake
from fastlora.compat.dispatch import grouped_mm

_AT_ONCE = (8, 0)
"""The compute capability from which on `torch._grouped_mm` runs."""


def reference(x: torch.Tensor, matrices: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """The products group by group, differentiable by autograd, in any dtype. Rows in no group are zero.

    Raises:
        ValueError: if the offsets are not the ends of groups of x's rows.
    """
    ends = _ends(offs, x.shape[0])
    parts = [x[start:end] @ matrix for start, end, matrix in zip([0, *ends[:-1]], ends, matrices, strict=True)]
    return torch.cat([*parts, x.new_zeros(x.shape[0] - ends[-1], matrices.shape[-1])])


def _ends(offs: torch.Tensor, rows: int) -> list[int]:
    ends: list[int] = offs.tolist()
    if ends != sorted(ends) or ends[0] < 0 or ends[-1] > rows:
        raise ValueError(f"offs: {ends} are not the ends of groups of {rows} rows")
    return ends


def even_ends(given: dict[str, torch.Tensor]) -> torch.Tensor:
    """Offsets that give each group about as many of the rows of `x`; `offs` says how many groups there are."""
    rows, offs = given["x"].shape[0], given["offs"]
    ends = [rows * (e + 1) // offs.shape[0] for e in range(offs.shape[0])]
    return torch.tensor(ends, dtype=offs.dtype, device=offs.device)


def aligned(t: torch.Tensor) -> torch.Tensor:
    """`t` if its rows, or else its columns, begin at multiples of 16 bytes and have no gaps; otherwise a copy whose
    rows do, with zeros after them."""
    unit = 16 // t.element_size()
    (rows, cols), (row_stride, col_stride) = t.shape[-2:], t.stride()[-2:]
    lies = (col_stride == 1 and row_stride >= cols and row_stride % unit == 0) or (
        row_stride == 1 and col_stride >= rows and col_stride % unit == 0
    )
    apart = t.dim() == 2 or t.stride(0) % unit == 0
    if lies and apart and t.data_ptr() % 16 == 0:
        return t
    padded = t.new_zeros(*t.shape[:-1], -(-cols // unit) * unit)
    return padded[..., :cols].copy_(t)


def makes_at_once(like: torch.Tensor) -> bool:
    """Whether products of tensors like this one are made by `torch._grouped_mm`."""
    return like.is_cuda and like.dtype is torch.bfloat16 and torch.cuda.get_device_capability(like.device) >= _AT_ONCE


class Groups:
    """The rows of each group in tensors that have as many rows and the dtype of `like`."""

    def __init__(self, offs: torch.Tensor, like: torch.Tensor, zero_rest: bool) -> None:
        self._offs, self._rows, self._zero_rest = offs, like.shape[0], zero_rest
        self._asks_for_shapes = is_fake(like) or like.is_meta
        self._at_once = not self._asks_for_shapes and makes_at_once(like)

    def product(self, x: torch.Tensor, matrices: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
        """alpha x_t W_e. Returns (T, N)."""
        if self._at_once:
            return self._rested(_scaled(self._all(aligned(x), matrices), alpha))
        y = x.new_empty(x.shape[0], matrices.shape[-1])
        return self._rested(self._one_by_one(y, x, matrices, beta=0, alpha=alpha))

    def add_product(
        self, total: torch.Tensor, x: torch.Tensor, matrices: torch.Tensor, alpha: float = 1.0
    ) -> torch.Tensor:
        """Adds alpha x_t W_e to a result of `product`, in place."""
        if self._at_once:
            return self._rested(total.add_(self._all(aligned(x), matrices), alpha=alpha))
        return self._one_by_one(total, x, matrices, beta=1, alpha=alpha)

    def outer(self, left: torch.Tensor, right: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
        """alpha times the sum of l_t^T r_t over the rows of each group. Returns (E, M, N)."""
        if self._at_once:
            return _scaled(self._all(aligned(left).t(), right), alpha)
        made = left.new_empty(self._offs.shape[0], left.shape[1], right.shape[1])
        if not self._asks_for_shapes:
            for each, one, other in zip(made.unbind(), self._parts(left), self._parts(right), strict=True):
                if len(one):
                    each.addmm_(one.t(), other, beta=0, alpha=alpha)
                else:
                    each.zero_()
        return made

    @cached_property
    def _sizes(self) -> list[int]:
        """How many rows each group has, for which a GPU is waited for."""
        ends = _ends(self._offs, self._rows)
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _parts(self, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The rows of each group, without those of none."""
        return t[: sum(self._sizes)].split(self._sizes)

    def _one_by_one(self, y: torch.Tensor, x: torch.Tensor, matrices: torch.Tensor, **factors: Any) -> torch.Tensor:
        if not self._asks_for_shapes:
            for mine, its, matrix in zip(self._parts(y), self._parts(x), matrices.unbind(), strict=True):
                if len(its):
                    mine.addmm_(its, matrix, **factors)
        return y

    def _all(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return grouped_mm(left, aligned(right), offs=self._offs.to(torch.int32)).contiguous()

    def _rested(self, y: torch.Tensor) -> torch.Tensor:
        """`y` with zeros in the rows of no group. Group by group that costs nothing where there are none."""
        if self._at_once and self._zero_rest:
            beyond = torch.arange(self._rows, device=y.device) >= self._offs[-1]
            return y.masked_fill_(beyond[:, None], 0)
        if not self._at_once and not self._asks_for_shapes:
            y[sum(self._sizes) :].zero_()
        return y


def _scaled(t: torch.Tensor, alpha: float) -> torch.Tensor:
    return t if alpha == 1 else t.mul_(alpha)
