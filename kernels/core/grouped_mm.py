"""Grouped matrix products, of rows that are sorted by group, such as the tokens of experts.

    product:  y_t = s x_t W_e      for the rows t of group e, offs[e - 1] <= t < offs[e]
    outer:    G_e = s sum of l_t^T r_t over these rows; zero for a group without any

Rows from the last offset on are in no group, such as tokens of experts on other devices, and must not be read. The
corresponding rows of results are undefined, as in `torch._grouped_mm`, or zero if requested.

On GPUs `torch._grouped_mm` computes all bfloat16 products in one launch, without synchronizing on the offsets. It
requires rows to be aligned to 16 bytes, does not support float64, and supports only bfloat16 while tracing. All other
cases run group by group here: on a CPU in any dtype, on a GPU after one synchronization per forward and backward.

Shapes: x (T, K), W (E, K, N), y (T, N), l (T, M), r (T, N), G (E, M, N), offs (E,) of integers.
Source: first principles.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch

from fastlora.compat.calls import is_fake
from fastlora.compat.dispatch import grouped_mm

_GROUPED_MM_CAPABILITY = (8, 0)
"""The minimum compute capability of `torch._grouped_mm`."""


def reference(x: torch.Tensor, matrices: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    """Return the products, computed group by group, in any dtype, differentiable by autograd; zero for other rows.

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
    """Return offsets like `offs` that divide the rows of `x` evenly."""
    rows, offs = given["x"].shape[0], given["offs"]
    ends = [rows * (e + 1) // offs.shape[0] for e in range(offs.shape[0])]
    return torch.tensor(ends, dtype=offs.dtype, device=offs.device)


def aligned(t: torch.Tensor) -> torch.Tensor:
    """Return `t` if its rows or its columns are contiguous and aligned to 16 bytes; otherwise a copy with aligned rows,
    padded with zeros."""
    unit = 16 // t.element_size()
    (rows, cols), (row_stride, col_stride) = t.shape[-2:], t.stride()[-2:]
    is_aligned = (col_stride == 1 and row_stride >= cols and row_stride % unit == 0) or (
        row_stride == 1 and col_stride >= rows and col_stride % unit == 0
    )
    batch_is_aligned = t.dim() == 2 or t.stride(0) % unit == 0
    if is_aligned and batch_is_aligned and t.data_ptr() % 16 == 0:
        return t
    padded = t.new_zeros(*t.shape[:-1], -(-cols // unit) * unit)
    return padded[..., :cols].copy_(t)


def uses_grouped_mm(like: torch.Tensor) -> bool:
    """Return whether products of tensors like this one are computed by `torch._grouped_mm`."""
    supported = like.is_cuda and like.dtype is torch.bfloat16
    return supported and torch.cuda.get_device_capability(like.device) >= _GROUPED_MM_CAPABILITY


class Groups:
    """Grouped products of tensors with the number of rows and the dtype of `like`.

    With `zero_rest`, results are zero in rows of no group.
    """

    def __init__(self, offs: torch.Tensor, like: torch.Tensor, zero_rest: bool) -> None:
        self._offs, self._rows, self._zero_rest = offs, like.shape[0], zero_rest
        self._only_shapes = is_fake(like) or like.is_meta
        self._in_one_launch = not self._only_shapes and uses_grouped_mm(like)

    def product(self, x: torch.Tensor, matrices: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
        """Return alpha x_t W_e, of shape (T, N)."""
        if self._in_one_launch:
            return self._zero_other_rows(_scaled(self._grouped_mm(aligned(x), matrices), alpha))
        y = x.new_empty(x.shape[0], matrices.shape[-1])
        return self._zero_other_rows(self._group_by_group(y, x, matrices, beta=0, alpha=alpha))

    def add_product(
        self, total: torch.Tensor, x: torch.Tensor, matrices: torch.Tensor, alpha: float = 1.0
    ) -> torch.Tensor:
        """Add alpha x_t W_e to a result of `product` in place, and return it."""
        if self._in_one_launch:
            return self._zero_other_rows(total.add_(self._grouped_mm(aligned(x), matrices), alpha=alpha))
        return self._group_by_group(total, x, matrices, beta=1, alpha=alpha)

    def outer(self, left: torch.Tensor, right: torch.Tensor, alpha: float = 1.0) -> torch.Tensor:
        """Return alpha times the sum of l_t^T r_t over the rows of each group, of shape (E, M, N)."""
        if self._in_one_launch:
            return _scaled(self._grouped_mm(aligned(left).t(), right), alpha)
        result = left.new_empty(self._offs.shape[0], left.shape[1], right.shape[1])
        if not self._only_shapes:
            for out, l_rows, r_rows in zip(result.unbind(), self._split(left), self._split(right), strict=True):
                if len(l_rows):
                    out.addmm_(l_rows.t(), r_rows, beta=0, alpha=alpha)
                else:
                    out.zero_()
        return result

    @cached_property
    def _sizes(self) -> list[int]:
        """The number of rows of each group; synchronizes with the GPU."""
        ends = _ends(self._offs, self._rows)
        return [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def _split(self, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the rows of each group."""
        return t[: sum(self._sizes)].split(self._sizes)

    def _group_by_group(self, y: torch.Tensor, x: torch.Tensor, matrices: torch.Tensor, **factors: Any) -> torch.Tensor:
        if not self._only_shapes:
            for y_rows, x_rows, matrix in zip(self._split(y), self._split(x), matrices.unbind(), strict=True):
                if len(x_rows):
                    y_rows.addmm_(x_rows, matrix, **factors)
        return y

    def _grouped_mm(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return grouped_mm(left, aligned(right), offs=self._offs.to(torch.int32)).contiguous()

    def _zero_other_rows(self, y: torch.Tensor) -> torch.Tensor:
        """Zero the rows of no group in place: if requested, or always where it costs nothing, and return `y`."""
        if self._in_one_launch and self._zero_rest:
            beyond = torch.arange(self._rows, device=y.device) >= self._offs[-1]
            return y.masked_fill_(beyond[:, None], 0)
        if not self._in_one_launch and not self._only_shapes:
            y[sum(self._sizes) :].zero_()
        return y


def _scaled(t: torch.Tensor, alpha: float) -> torch.Tensor:
    return t if alpha == 1 else t.mul_(alpha)
