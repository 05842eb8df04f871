"""Frozen matrices that are kept encoded, such as 4-bit weights: an op decodes one where it reads it, and not before.

So a decoded matrix lives for one product, in the forward and again in the backward, and nothing but the few bytes that
it is made of is kept in between. However many layers there are, and however many products an op makes, their matrices
take the same memory one after the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastlora.kernels.core.semantic_op import SemanticOp


class Encoded:
    """Stands in for a matrix, of which forms ask the shape, dtype and device, and take the decoded one by `to`.

    Attributes:
        maker: the op whose only output the matrix is.
        values: that op's arguments, in the schema's order.
        arguments: the same by name.
        shape, dtype: of the matrix.
    """

    def __init__(self, maker: SemanticOp, values: Sequence[Any]) -> None:
        self.maker, self.values = maker, values
        self.arguments: dict[str, Any] = dict(zip(maker.names, values, strict=True))
        self.shape = torch.Size((self.arguments["rows"], self.arguments["cols"]))
        self.dtype: torch.dtype = self.arguments["dtype"]
        self._leaves = maker.leaves.flat(values)

    @property
    def device(self) -> torch.device:
        return next(t.device for t in self._leaves if t is not None)

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        """The matrix, decoded anew."""
        made: torch.Tensor = self.maker.below_autograd(self._leaves, self.values)
        return made if made.dtype is dtype else made.to(dtype)

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()


def decoded(values: Iterable[Any]) -> list[Any]:
    """Values, in lists as well, with every matrix in place of what stands in for it."""
    return [
        value.to(value.dtype) if isinstance(value, Encoded) else decoded(value) if type(value) is list else value
        for value in values
    ]
