"""The output head's compiled-call slot: what decides, call by call, whether the head's product is deferred."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.bypass import calling_module, has_hooks, transform
from fastlora.logits_autograd import defer, is_worthwhile
from fastlora.session import Session


class DeferringHead:
    """Sits in the head's compiled-call slot: defers the product while gradients are on, else calls the module."""

    def __init__(self, head: nn.Linear, session: Session) -> None:
        self._head, self.session = head, session

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        head = self._head if compiling else calling_module(self._head)
        if len(args) == 1 and not kwargs and not compiling and head is self._head and self._defers(args[0]):
            device = args[0].device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else args[0].dtype
            return defer(args[0], head.weight, head.bias, dtype, dtype, self.session.tally)
        return head._call_impl(*args, **kwargs)

    def _defers(self, hidden: Any) -> bool:
        head = self._head
        return is_plain_linear(head) and not has_hooks(head) and is_worthwhile(hidden, head.weight) and not transform()


def is_plain_linear(module: nn.Module | None) -> bool:
    """Whether a module is `nn.Linear` and nothing has replaced its forward, as accelerate's hooks do."""
    return type(module) is nn.Linear and "forward" not in vars(module)


def is_vocabulary(head: nn.Module) -> bool:
    """Whether a head makes more logits than it has inputs, as for the words of a vocabulary."""
    shape: tuple[int, ...] = getattr(getattr(head, "weight", None), "shape", ())
    return len(shape) == 2 and shape[0] > shape[1]


def can_defer(head: nn.Module | None) -> bool:
    """Whether a head is a plain linear layer on a vocabulary larger than the hidden size."""
    return why_not(head) is None


def why_not(head: nn.Module | None) -> str | None:
    """Return why a head's product cannot be deferred, None if it can."""
    if head is None:
        return "the model has no output head"
    if not isinstance(head, nn.Linear) or not is_plain_linear(head):
        replaced = " whose forward was replaced" if type(head) is nn.Linear else ""
        return f"the output head is a {type(head).__name__}{replaced}, not a plain nn.Linear"
    if head.out_features <= head.in_features:
        return f"the output head makes {head.out_features} logits of {head.in_features} hidden values, and no more"
    if type(head.weight) not in (torch.Tensor, nn.Parameter):
        return f"the output head's weight is a {type(head.weight).__name__}, not a plain tensor"
    return "the model is on the meta device" if head.weight.is_meta else None
