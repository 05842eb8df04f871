"""Frozen quantized matrices that ops dequantize only where they read them.

So a dequantized matrix exists during one product, in the forward and again in the backward, and only the quantized
bytes are saved in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fastlora.kernels.core.execution import compute
from fastlora.kernels.core.semantic_op import SemanticOp


class QuantizedWeight:
    """A quantized matrix with the attributes that implementations use: shape, dtype, device, and `to` to dequantize it.

    Attributes:
        source: the op that dequantizes the matrix, its only output.
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
        """Dequantize the matrix and return it in `dtype`."""
        matrix: torch.Tensor = compute(self.source, self.values)
        return matrix if matrix.dtype is dtype else matrix.to(dtype)

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()


def dequantized(values: Iterable[Any]) -> list[Any]:
    """Return values with every `QuantizedWeight`, also in lists, replaced by its dequantized matrix."""
    return [
        value.to(value.dtype)
        if isinstance(value, QuantizedWeight)
        else dequantized(value)
        if type(value) is list
        else value
        for value in values
    ]
