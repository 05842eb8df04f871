"""PyTorch functions that keep deferred logits deferred: a cross-entropy of them, and rows by an index with tensors.

Each returns `NotImplemented` for arguments that it cannot take; PyTorch's own function then computes the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.errors import FastLoRAError
from fastlora.logits.autograd import CrossEntropy, Rows
from fastlora.logits.deferred_logits import DeferredLogits

_TENSOR: Any = torch.Tensor


def _is_deferred(t: Any) -> bool:
    return isinstance(t, DeferredLogits) and not t.cell.memory.is_shared and not torch.is_inference_mode_enabled()


def _cross_entropy(
    input: Any, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    plainly = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum", "none")
    if not plainly or not _is_deferred(input) or input.dim() != 2 or type(target) is not torch.Tensor:
        return NotImplemented
    if (problem := input.snapshot.problem(look=input.tally.has_gone_back(input.snapshot.moment))) is not None:
        if input.cell.is_computed:  # then only the value can be used
            return NotImplemented
        raise FastLoRAError(problem)
    if target.dtype not in (torch.int64, torch.uint8) or target.device != input.device:
        return NotImplemented
    if target.shape != input.shape[:1] or not input.numel() or not 0.0 <= label_smoothing <= 1.0:
        return NotImplemented
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return CrossEntropy.apply(input, target.to(torch.int64), options)


def _rows(input: Any, index: Any) -> Any:
    if not _is_deferred(input):
        return NotImplemented
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(part, torch.Tensor) for part in parts):
        return NotImplemented
    rows = _without_last(parts, input.dim())
    return (
        NotImplemented if rows is None else Rows.apply(input, rows, *(t for t in rows if isinstance(t, torch.Tensor)))
    )


def _without_last(parts: tuple[Any, ...], dims: int) -> tuple[Any, ...] | None:
    """Return an index without its part for the last dimension, if it takes all of that; None for another index."""
    taken = 0
    for i, part in enumerate(parts):
        if part is Ellipsis:
            rest = parts[i + 1 :]
            return parts[:i] if rest in ((), (slice(None),)) and taken < dims else None
        if isinstance(part, torch.Tensor):
            plainly = type(part) is torch.Tensor and part.dtype in (torch.bool, torch.int64)
            if not plainly or not part.dim():  # a scalar, which makes a view
                return None
            taken += part.dim() if part.dtype is torch.bool else 1
        elif isinstance(part, (int, slice)) and not isinstance(part, bool):
            taken += 1
        else:
            return None
        if taken == dims and part == slice(None) and i == len(parts) - 1:
            return parts[:-1]
    return parts if taken < dims else None


OVERRIDES: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    _TENSOR.__getitem__: _rows,
}
