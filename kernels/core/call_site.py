"""Calls of ops with little overhead, for graphs that run eagerly.

A `CallSite` is an op with its constants bound. It keeps a `Plan` for each layout of input tensors, which says what to
save and which gradients to compute, and finds it by one guard in C++. If the implementation is traceable, the plan's
forward and backward replay the kernel launches and PyTorch operators of an earlier call, and do nothing else.

Calls that the dispatcher has to see (fake tensors, tensor subclasses, modes, torch.func transforms) go through the
registered operator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastlora.compat import calls
from fastlora.compat import dispatch as compat_dispatch
from fastlora.kernels.core import dispatch, implementations, recompute, shortcuts
from fastlora.kernels.core.arguments import Arguments, bind, resolve_all
from fastlora.kernels.core.plan import Plan, PlannedCall
from fastlora.kernels.core.quantized_weight import dequantized
from fastlora.kernels.core.semantic_op import DerivedArgument, SemanticOp

MAX_PLANS = 256
"""Plans that a call site keeps; a limit for sequence lengths that do not recur."""

_apply = calls.apply_of(PlannedCall)


class CallSite:
    """An op with its constants bound; call it with its tensors, followed by its numbers that vary.

    It returns a tuple of the op's outputs, in which lists stay lists; for an op with a single result, that tensor.

    Args:
        op: the op.
        arguments: how the inputs map to the op's arguments.
    """

    def __init__(self, op: SemanticOp, arguments: Arguments) -> None:
        self.op, self.arguments = op, arguments
        self.__name__ = self.__qualname__ = op.name  # FX requires that call_function targets have a name
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
        if shortcuts.use.plans and plan.check(*tensors):  # fails if a tensor is passed twice
            if self._made == MAX_PLANS:
                self._plans.clear()
                self._made = 0
            self._plans.setdefault(key, []).append(plan)
            self._made += 1
        return plan

    def _through_dispatcher(self, given: tuple[Any, ...]) -> Any:
        op = self.op
        values = dequantized(resolve_all(self.arguments.slots, given))
        results = op.as_tuple(op.target(*values, *([[]] if op.policy.grads_in_forward else [])))
        return results[: len(op.outputs)] if len(op.result_names) > 1 else results[0]


def call_site(
    op: SemanticOp,
    values: Sequence[Any],
    derived: Sequence[tuple[DerivedArgument, Sequence[Any]]] = (),
    varies: Callable[[Any], bool] = lambda value: isinstance(value, torch.Tensor),
) -> tuple[CallSite, list[Any]]:
    """Bind the constants of a call of an op; return the call site and the inputs to call it with.

    Args:
        op: the op.
        values: its arguments in the schema's order.
        derived: arguments that other ops compute, with those ops' arguments.
        varies: whether a value is an input, not a constant: by default a tensor; in a graph, a node.

    Raises:
        ValueError: for a derived argument that the op does not save or, if it is quantized, does not read quantized.
    """
    arguments, given = bind(op, values, derived, varies)
    return CallSite(op, arguments), given
