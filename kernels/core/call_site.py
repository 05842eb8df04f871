"""Calls of ops in a graph that runs eagerly: planned once for each layout of their tensors, then a few calls of C.

A call of an op has much to find out that is the same in the next: which implementation serves, what to save, which
gradients to compute. So a `CallSite` is an op with its constants bound; it keeps a `Plan` for each layout of tensors
that it has met, and finds it again by one check in C++. Where the implementation can be traced, the plan's forward and
backward run what was recorded of an earlier call: kernel launches and PyTorch operators, and nothing else.

Calls that the dispatcher has to see (fake tensors, tensor subclasses, modes, transforms of torch.func) go through the
registered operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastlora.compat import calls
from fastlora.compat import dispatch as compat_dispatch
from fastlora.kernels.core import dispatch, implementations, recompute, shortcuts
from fastlora.kernels.core.arguments import Arguments, bind, fill_all
from fastlora.kernels.core.plan import Plan, PlannedCall
from fastlora.kernels.core.quantized_weight import dequantized
from fastlora.kernels.core.semantic_op import DerivedArgument, SemanticOp

MOST_PLANS = 256
"""Plans of one call site; lengths that never come back are not to fill the memory."""

_apply = calls.apply_of(PlannedCall)


class CallSite:
    """An op with its constants bound, to be called with its tensors, and then its varying numbers, one by one.

    It returns the op's outputs as a tuple, lists of them as lists; the one tensor of an op with one result as it is.

    Args:
        op: the op.
        arguments: where the tensors and numbers of a call stand among the op's arguments.
    """

    def __init__(self, op: SemanticOp, arguments: Arguments) -> None:
        self.op, self.arguments = op, arguments
        self.__name__ = self.__qualname__ = op.name  # of a function, as graphs want their targets to be
        self._tensors = arguments.tensors
        self._single, self._lists = len(op.result_names) == 1, any(a.is_list for a in op.outputs)
        self._plans: dict[Any, list[Plan]] = {}
        self._made = 0

    def __call__(self, *given: Any) -> Any:
        if compat_dispatch.dispatch_modes() or compat_dispatch.functorch_interpreter() is not None:
            return self._through_dispatcher(given)
        return dispatch.profiled(self.op.name, self._run, given)

    def _run(self, given: tuple[Any, ...]) -> Any:
        tensors, numbers = given[: self._tensors], given[self._tensors :]
        key = (
            tensors[0].shape, torch.is_grad_enabled(), recompute.current.not_saved is None,
            implementations.restricted.to, shortcuts.use.traces, repr(numbers) if numbers else "",
        )  # fmt: skip
        for plan in self._plans.get(key, ()):
            if plan.check(*tensors):
                break
        else:
            if not dispatch.can_bypass_dispatcher(tensors):
                return self._through_dispatcher(given)
            plan = self._plan(key, tensors, numbers)
        results = _apply(plan, *tensors) if plan.is_differentiable else plan.forward(tensors)[: plan.outputs]
        if self._lists:
            results = tuple(self.op.output_leaves.grouped(results))
        return results[0] if self._single else results

    def _plan(self, key: Any, tensors: tuple[torch.Tensor, ...], numbers: tuple[Any, ...]) -> Plan:
        plan = Plan(self.op, self.arguments, tensors, numbers, shortcuts.use.traces)
        if shortcuts.use.plans and plan.check(*tensors):  # which fails where one of them is there twice
            if self._made == MOST_PLANS:
                self._plans.clear()
                self._made = 0
            self._plans.setdefault(key, []).append(plan)
            self._made += 1
        return plan

    def _through_dispatcher(self, given: tuple[Any, ...]) -> Any:
        op = self.op
        values = dequantized(fill_all(self.arguments.slots, given))
        results = op.as_tuple(op.target(*values, *([[]] if op.policy.grads_in_forward else [])))
        return results[: len(op.outputs)] if len(op.result_names) > 1 else results[0]


def call_site(
    op: SemanticOp,
    values: Sequence[Any],
    derived: Sequence[tuple[DerivedArgument, Sequence[Any]]] = (),
    varies: Callable[[Any], bool] = lambda value: isinstance(value, torch.Tensor),
) -> tuple[CallSite, list[Any]]:
    """Bind the constants of a call of an op; return the call site and what to call it with.

    Args:
        op: the op.
        values: its arguments in the schema's order.
        derived: arguments that are made of other ops' arguments, with these.
        varies: whether a value is no constant: a tensor, or what stands for one in a graph.

    Raises:
        ValueError: for a derived argument that the op does not save or, quantized, does not read so.
    """
    arguments, given = bind(op, values, derived, varies)
    return CallSite(op, arguments), given
