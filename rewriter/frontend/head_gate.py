"""The gate in the output head's compiled-call slot, which decides for each call whether the logits are deferred."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastlora.compat.dispatch import tree_map_only
from fastlora.compat.modules import frees_parameters_after_forward, parameters_of, uncompiled_call
from fastlora.frontend.bypass import calling_module, has_active_modes, has_hooks, unsupported_transform
from fastlora.frontend.session import Session
from fastlora.logits.defer import defer, linear_dtype
from fastlora.logits.deferred_logits import DeferredLogits

_FORWARD = nn.Linear.forward


class HeadGate:
    """Returns deferred logits while gradients are enabled, and calls the head otherwise.

    Args:
        head: the output head.
        session: the session of the compiled model.
        ancestors: the modules that contain the head, innermost first.
    """

    def __init__(self, head: nn.Linear, session: Session, ancestors: Sequence[nn.Module] = ()) -> None:
        self._head, self.session, self._ancestors = head, session, (head, *ancestors)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        head = self._head if compiling else calling_module(self._head)
        if compiling or head is not self._head or len(args) != 1 or kwargs or not self._may_defer():
            return uncompiled_call(head)(*args, **kwargs)
        parameters = parameters_of(head)
        weight: Any = parameters["weight"]
        bias = parameters["bias"]
        dtype = linear_dtype(args[0], weight, bias)
        if dtype is None:
            return uncompiled_call(head)(*args, **kwargs)
        compute_before_reshard(self._ancestors)
        return defer(args[0], weight, bias, dtype, dtype, self.session.deferral_stats)

    def _may_defer(self) -> bool:
        head = self._head
        if not torch.is_grad_enabled() or unsupported_transform() or has_active_modes():
            return False
        problem = deferral_problem(head)
        if problem is None and has_hooks(head):
            problem = "hooks run around the output head"
        if problem is None and type(parameters_of(head)["weight"]) is not nn.Parameter:
            problem = f"the output head's weight is a {type(head.weight).__name__}, not a plain tensor"
        if problem is not None:
            self.session.record_unfused_loss(problem)
        return problem is None


def is_plain_linear(module: nn.Module | None) -> bool:
    """Return whether a module is an `nn.Linear` whose forward was not replaced, as accelerate's hooks do, and whose
    weight is not computed, as by parametrizations. A subclass that changes neither, such as FSDP's, counts as one."""
    if not isinstance(module, nn.Linear) or type(module).forward is not _FORWARD or "forward" in vars(module):
        return False
    return {"weight", "bias"} <= parameters_of(module).keys() and not hasattr(type(module), "weight")


def is_vocabulary(head: nn.Module) -> bool:
    """Return whether a head has more outputs than inputs, as one for a vocabulary has."""
    shape: tuple[int, ...] = getattr(getattr(head, "weight", None), "shape", ())
    return len(shape) == 2 and shape[0] > shape[1]


def deferral_problem(head: nn.Module | None) -> str | None:
    """Return why the output of a head cannot be deferred, None if it can."""
    if head is None:
        return "the model has no output head"
    if not isinstance(head, nn.Linear) or not is_plain_linear(head):
        replaced = " whose forward was replaced" if "forward" in vars(head) or type(head) is nn.Linear else ""
        kind = "Linear" if type(head) is nn.Linear else f"{type(head).__module__}.{type(head).__name__}"
        return f"the output head is a {kind}{replaced}, not a plain nn.Linear"
    if head.out_features <= head.in_features:
        return (
            f"the output head has {head.out_features} outputs for {head.in_features} inputs: it is not a vocabulary's"
        )
    return "the model is on the meta device" if head.weight.is_meta else None


def compute_before_reshard(modules: Sequence[nn.Module]) -> None:
    """If FSDP frees the weight of the head after the forward of one of these modules, compute the logits before that.

    Args:
        modules: the head and the modules that contain it, innermost first.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return
    from torch.distributed.fsdp import FSDPModule

    sharded = next((module for module in modules if isinstance(module, FSDPModule)), None)
    if sharded is None or not frees_parameters_after_forward(sharded):
        return

    def compute(module: nn.Module, args: Any, output: Any) -> None:
        handle.remove()
        tree_map_only(DeferredLogits, lambda logits: logits.lazy.get(), output)

    handle = sharded.register_forward_hook(compute, prepend=True)
