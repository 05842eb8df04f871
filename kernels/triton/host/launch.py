"""What the Triton forms share: dtypes, rows, allocation, and how many programs to start.

Kernels take sizes that change from batch to batch unspecialised, compute addresses in 64 bits, widen what they load to
float32 first, and round once, when they store.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

IS_INTERPRETED = triton.knobs.runtime.interpret
"""Whether Triton's interpreter runs the kernels, which is settled when they are defined."""
TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


class Rows:
    """The rows of `x` (..., H) in the order they lie in memory, and other tensors of its shape in that order.

    Heads that were transposed stay transposed in memory, as in PyTorch's elementwise operators, and cost no copy;
    unless the kernel has to know which row is which, which then are `numbered` in x's own order.
    """

    def __init__(self, x: torch.Tensor, numbered: bool = False) -> None:
        self._order: list[int] | None = None
        if not numbered and not x.is_contiguous():
            strides = torch.empty_like(x, device="meta").stride()
            leading = sorted(range(x.dim() - 1), key=lambda dim: -strides[dim])
            self._order = [*leading, x.dim() - 1]
        self._shape = x.shape if self._order is None else [x.shape[dim] for dim in self._order]
        self._like = x
        self.count = x.numel() // x.shape[-1]

    def of(self, t: torch.Tensor) -> torch.Tensor:
        """`t` as a matrix whose rows are contiguous: a view where its strides allow one, else a copy."""
        if self._order is None and t.dim() == 2:
            return t if t.stride(1) == 1 else t.contiguous()
        matrix = (t if self._order is None else t.permute(self._order)).reshape(-1, t.shape[-1])
        return matrix if matrix.stride(1) == 1 else matrix.contiguous()

    def empty(self, width: int, dtype: torch.dtype) -> torch.Tensor:
        """Memory for a result (..., width) that a kernel will write row by row."""
        t = allocate((*self._shape[:-1], width), dtype, self._like.device)
        return t if self._order is None else t.permute([self._order.index(dim) for dim in range(t.dim())])


def vector(t: torch.Tensor | None) -> torch.Tensor | None:
    """`t`, of one dimension, with its elements side by side."""
    return t if t is None else t.contiguous()


def empty(*shape: int, like: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Contiguous memory that a kernel will write in full."""
    return allocate(shape, dtype or like.dtype, like.device)


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Where all memory of the Triton forms comes from."""
    return torch.empty(shape, dtype=dtype, device=device)


def power_of_two(n: int) -> int:
    """The smallest that is no less than n > 0."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes microseconds on the host."""
    return -(-a // b)
