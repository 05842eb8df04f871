"""Frozen matrices that are stored quantized: an op dequantizes one where it reads it, and not before.

So a dequantized matrix lives for one product, in the forward and again in the backward, and only the few bytes that it
is made of are kept in between. However many layers there are, their matrices take the same memory one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastlora.kernels.core.execution import compute
from fastlora.kernels.core.semantic_op import SemanticOp


class QuantizedWeight:
    """Stands in for a matrix: implementations ask its shape, dtype and device, and take the dequantized one by `to`.

    Attributes:
        source: the op whose only output the matrix is.
        values: that op's arguments, in the schema's order.
        arguments: the same by name.
        shape, dtype: of the matrix.
    """

    def __init__(self, source: SemanticOp, values: Sequence[Any]) -> None:
        self.source, self.values = source, values
        self.arguments: dict[str, Any] = dict(zip(source.names, values, strict=True))
        self.shape = torch.Size((self.arguments["rows"], self.arguments["cols"]))
        self.dtype: torch.dtype = self.arguments["dtype"]

    @property
    def device(self) -> torch.device:
        return next(t.device for t in self.source.leaves.flat(self.values) if t is not None)

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the matrix, dequantized anew."""
        matrix: torch.Tensor = compute(self.source, self.values)
        return matrix if matrix.dtype is dtype else matrix.to(dtype)

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()


def dequantized(values: Iterable[Any]) -> list[Any]:
    """Return values, in lists as well, with every matrix in place of what stands in for it."""
    return [
        value.to(value.dtype)
        if isinstance(value, QuantizedWeight)
        else dequantized(value)
        if type(value) is list
        else value
        for value in values
    ]
