"""Overrides of PyTorch functions that keep logits deferred: cross-entropy, and indexing rows with tensors.

Each returns `NotImplemented` for arguments that it does not support; PyTorch's function then computes the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.errors import FastLoRAError
from fastlora.logits.autograd import CrossEntropy, SelectRows
from fastlora.logits.deferred_logits import DeferredLogits

_TENSOR: Any = torch.Tensor


def _is_deferred(t: Any) -> bool:
    return isinstance(t, DeferredLogits) and not t.lazy.storage.is_shared and not torch.is_inference_mode_enabled()


def _cross_entropy(
    input: Any, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    supported = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum", "none")
    if not supported or not _is_deferred(input) or input.dim() != 2 or type(target) is not torch.Tensor:
        return NotImplemented
    snapshot = input.snapshot
    if (problem := snapshot.problem(check_values=input.stats.ran_backward_since(snapshot.taken_at))) is not None:
        if input.lazy.is_computed:  # the computed logits are still right
            return NotImplemented
        raise FastLoRAError(problem)
    if target.dtype not in (torch.int64, torch.uint8) or target.device != input.device:
        return NotImplemented
    if target.shape != input.shape[:1] or not input.numel() or not 0.0 <= label_smoothing <= 1.0:
        return NotImplemented
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return CrossEntropy.apply(input, target.to(torch.int64), options)


def _getitem(input: Any, index: Any) -> Any:
    if not _is_deferred(input):
        return NotImplemented
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(part, torch.Tensor) for part in parts):
        return NotImplemented
    rows = _row_index(parts, input.dim())
    if rows is None:
        return NotImplemented
    return SelectRows.apply(input, rows, *(part for part in rows if isinstance(part, torch.Tensor)))


def _row_index(parts: tuple[Any, ...], dims: int) -> tuple[Any, ...] | None:
    """Return the index without the last dimension, or None if it does not select all of that dimension."""
    indexed_dims = 0
    for i, part in enumerate(parts):
        if part is Ellipsis:
            after = parts[i + 1 :]
            return parts[:i] if after in ((), (slice(None),)) and indexed_dims < dims else None
        if isinstance(part, torch.Tensor):
            supported = type(part) is torch.Tensor and part.dtype in (torch.bool, torch.int64)
            if not supported or not part.dim():  # indexing with a scalar tensor makes a view
                return None
            indexed_dims += part.dim() if part.dtype is torch.bool else 1
        elif isinstance(part, (int, slice)) and not isinstance(part, bool):
            indexed_dims += 1
        else:
            return None
        if indexed_dims == dims and part == slice(None) and i == len(parts) - 1:
            return parts[:-1]
    return parts if indexed_dims < dims else None


OVERRIDES: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    _TENSOR.__getitem__: _getitem,
}
