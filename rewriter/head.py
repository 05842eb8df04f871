"""The output head's compiled-call slot: what decides, call by call, whether the head's product is deferred."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from fastlora.bypass import calling_module, has_hooks, transform
from fastlora.logits import DeferredLogits
from fastlora.logits_autograd import defer, is_worthwhile
from fastlora.session import Session


class DeferringHead:
    """Sits in the head's compiled-call slot: defers the product while gradients are on, else calls the module."""

    def __init__(self, head: nn.Linear, session: Session, around: Sequence[nn.Module] = ()) -> None:
        """Args: the head, its session, and the modules that hold it, innermost first."""
        self._head, self.session, self._around = head, session, (head, *around)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        head = self._head if compiling else calling_module(self._head)
        if len(args) == 1 and not kwargs and not compiling and head is self._head and self._defers(args[0]):
            device = args[0].device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else args[0].dtype
            compute_before_reshard(self._around)
            return defer(args[0], head.weight, head.bias, dtype, dtype, self.session.tally)
        return head._call_impl(*args, **kwargs)

    def _defers(self, hidden: Any) -> bool:
        head, problem = self._head, None
        if not torch.is_grad_enabled() or transform():
            return False
        if not is_plain_linear(head):
            problem = why_not(head)
        elif has_hooks(head):
            problem = "hooks run around the output head"
        elif type(head.weight) not in (torch.Tensor, nn.Parameter):
            problem = f"the output head's weight is a {type(head.weight).__name__}, not a plain tensor"
        self.session.head_problem = problem
        return problem is None and is_worthwhile(hidden, head.weight)


def is_plain_linear(module: nn.Module | None) -> bool:
    """Whether a module is an `nn.Linear` and nothing has replaced its forward, as accelerate's hooks do; FSDP makes a
    subclass that keeps it."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and "forward" not in vars(module)


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
        replaced = " whose forward was replaced" if "forward" in vars(head) else ""
        return f"the output head is a {type(head).__name__}{replaced}, not a plain nn.Linear"
    if head.out_features <= head.in_features:
        return f"the output head makes {head.out_features} logits of {head.in_features} hidden values, and no more"
    return "the model is on the meta device" if head.weight.is_meta else None


def compute_before_reshard(modules: Sequence[nn.Module]) -> None:
    """Have logits that leave the module which shards the head computed before that frees the head's weight.

    Args:
        modules: the head and what holds it, innermost first.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    sharded = next((module for module in modules if isinstance(module, FSDPModule)), None)
    if sharded is None or not _reshards(sharded):
        return

    def compute(module: nn.Module, args: Any, output: Any) -> None:
        handle.remove()
        tree_map_only(DeferredLogits, lambda logits: logits.cell.get(), output)

    handle = sharded.register_forward_hook(compute, prepend=True)


def _reshards(module: Any) -> bool:
    """Whether FSDP frees a module's parameters after its forward; True if that cannot be told."""
    group = getattr(module._get_fsdp_state(), "_fsdp_param_group", None)
    return getattr(group, "_reshard_after_forward", True)
