"""Host-side helpers of the Triton implementations: dtypes, row layouts, allocation.

Conventions of all kernels: sizes that change from batch to batch are not specialized, addresses are 64-bit, values are
cast to float32 when loaded and rounded once when stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

IS_INTERPRETED = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs the kernels; read when they are defined."""
TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Rows:
    """Views tensors of the shape of `x` (..., H) as matrices whose rows are in the order of x's memory.

    So transposed heads stay transposed in results, as in PyTorch's elementwise operators, and cost no copy. With
    `keep_order` rows are in logical order instead, for kernels that depend on the index of a row.
    """

    def __init__(self, x: torch.Tensor, keep_order: bool = False) -> None:
        self._order: list[int] | None = None
        if not keep_order and not x.is_contiguous():
            strides = torch.empty_like(x, device="meta").stride()
            leading = sorted(range(x.dim() - 1), key=lambda dim: -strides[dim])
            self._order = [*leading, x.dim() - 1]
        self._shape = x.shape if self._order is None else [x.shape[dim] for dim in self._order]
        self._like = x
        self.count = x.numel() // x.shape[-1]

    def as_matrix(self, t: torch.Tensor) -> torch.Tensor:
        """Return `t` as a matrix with contiguous rows: a view where its strides allow one, otherwise a copy."""
        if self._order is None and t.dim() == 2:
            return t if t.stride(1) == 1 else t.contiguous()
        matrix = (t if self._order is None else t.permute(self._order)).reshape(-1, t.shape[-1])
        return matrix if matrix.stride(1) == 1 else matrix.contiguous()

    def empty(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialized tensor (..., width) whose rows are in the same order."""
        t = allocate((*self._shape[:-1], width), dtype, self._like.device)
        return t if self._order is None else t.permute([self._order.index(dim) for dim in range(t.dim())])


def vector(t: torch.Tensor | None) -> torch.Tensor | None:
    """Return a contiguous 1-D tensor; None for None."""
    return t if t is None else t.contiguous()


def empty(*shape: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return an uninitialized contiguous tensor on the device of `like`, by default in its dtype."""
    return allocate(shape, dtype or like.dtype, like.device)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return an uninitialized contiguous tensor; all memory of the Triton implementations is allocated here."""
    return torch.empty(shape, dtype=dtype, device=device)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n > 0."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """Return a / b rounded up; `triton.cdiv` takes microseconds on the host."""
    return -(-a // b)
