"""Deferring the output of a head: `defer`, and whether it is possible."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.logits.autograd import PARAMETERS, DeferredLinear
from fastlora.logits.deferred_logits import DeferralStats, DeferredLogits
from fastlora.logits.logits_expr import Adapter, LogitsExpr
from fastlora.logits.overrides import OVERRIDES

DeferredLogits._overrides = OVERRIDES


def defer(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    base_dtype: torch.dtype,
    dtype: torch.dtype,
    stats: DeferralStats,
    adapter: Adapter | None = None,
) -> DeferredLogits:
    """Return the deferred `linear(hidden, weight, bias)` with its adapter, computed in `base_dtype`, as `dtype`."""
    matrices = (None, None) if adapter is None else adapter[:2]
    tensors = (hidden, weight, bias, *matrices)
    detached: list[Any] = [None if t is None else t.detach() for t in tensors]
    x, w, b, lora_a, lora_b = detached
    if adapter is not None:
        adapter = adapter._replace(lora_a=lora_a, lora_b=lora_b)
    requires_grad = frozenset(n for n, t in zip(PARAMETERS, tensors, strict=True) if t is not None and t.requires_grad)
    expr = LogitsExpr(x, w, b, base_dtype, dtype, adapter, requires_grad)
    logits: DeferredLogits = DeferredLinear.apply(expr, stats, *tensors)
    return logits


def linear_dtype(hidden: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.dtype | None:
    """Return the dtype of `F.linear(hidden, weight, bias)`, or None if it cannot be deferred: it requires no gradient,
    it would raise, or one of its tensors is a subclass."""
    if not can_defer(hidden, weight, bias):
        return None
    tensors = [t for t in (hidden, weight, bias) if t is not None]
    fits = hidden.dim() > 0 and hidden.shape[-1] == weight.shape[-1] and len({t.device for t in tensors}) == 1
    dtypes = {_read_dtype(t) for t in tensors} if fits else set()
    return dtypes.pop() if len(dtypes) == 1 else None


def can_defer(*tensors: torch.Tensor | None) -> bool:
    """Return whether a linear layer of these tensors requires a gradient, and none of them is a subclass."""
    given = [t for t in tensors if t is not None]
    are_plain = all(type(t) in (torch.Tensor, nn.Parameter) and not t.is_meta and not t.is_inference() for t in given)
    return are_plain and torch.is_grad_enabled() and any(t.requires_grad for t in given)


def _read_dtype(t: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer reads a tensor; autocast does not cast float64."""
    device = t.device.type
    cast = torch.is_autocast_enabled(device) and t.is_floating_point() and t.dtype is not torch.float64
    return torch.get_autocast_dtype(device) if cast else t.dtype
