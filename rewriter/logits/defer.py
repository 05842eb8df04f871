"""Deferring a head's product: whether that is possible, and the deferred logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.logits.autograd import PARAMETERS, Product
from fastlora.logits.deferred_logits import DeferredLogits, Tally
from fastlora.logits.overrides import OVERRIDES
from fastlora.logits.recipe import Adapter, Recipe

DeferredLogits._overrides = OVERRIDES


def defer(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    base_dtype: torch.dtype,
    dtype: torch.dtype,
    tally: Tally,
    adapter: Adapter | None = None,
) -> DeferredLogits:
    """Return the deferred `linear(hidden, weight, bias)`, computed in `base_dtype`, with an adapter if there is one."""
    low_rank = (None, None) if adapter is None else adapter[:2]
    tensors = (hidden, weight, bias, *low_rank)
    cut: list[Any] = [None if t is None else t.detach() for t in tensors]
    low = None if adapter is None else adapter._replace(lora_a=cut[3], lora_b=cut[4])
    trained = frozenset(n for n, t in zip(PARAMETERS, tensors, strict=True) if t is not None and t.requires_grad)
    recipe = Recipe(cut[0], cut[1], cut[2], base_dtype, dtype, low, trained)
    made: DeferredLogits = Product.apply(recipe, tally, *tensors)
    return made


def product_dtype(hidden: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.dtype | None:
    """Return the dtype of `F.linear(hidden, weight, bias)`, None if the product cannot be deferred: it has no
    gradient, it raises, or one of its tensors is a subclass."""
    if not can_defer(hidden, weight, bias):
        return None
    tensors = [t for t in (hidden, weight, bias) if t is not None]
    fits = hidden.dim() > 0 and hidden.shape[-1] == weight.shape[-1] and len({t.device for t in tensors}) == 1
    dtypes = {_cast(t) for t in tensors} if fits else set()
    return dtypes.pop() if len(dtypes) == 1 else None


def can_defer(*tensors: torch.Tensor | None) -> bool:
    """Whether a head's product of these tensors has a gradient, and none of them is of a subclass."""
    found = [t for t in tensors if t is not None]
    plainly = all(type(t) in (torch.Tensor, nn.Parameter) and not t.is_meta and not t.is_inference() for t in found)
    return plainly and torch.is_grad_enabled() and any(t.requires_grad for t in found)


def _cast(t: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a linear layer reads a tensor: autocast does not cast float64."""
    device = t.device.type
    cast = torch.is_autocast_enabled(device) and t.is_floating_point() and t.dtype is not torch.float64
    return torch.get_autocast_dtype(device) if cast else t.dtype
