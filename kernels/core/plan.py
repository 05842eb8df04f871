"""Plans of calls of an op on tensors of one layout: how it runs, what it saves, which gradients it computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import is_not, itemgetter
from typing import Any

import torch

from fastlora.compat import calls
from fastlora.compat import dispatch as compat_dispatch
from fastlora.compat.autograd import saved_tensors_hooks
from fastlora.kernels.core import dispatch, recompute
from fastlora.kernels.core.arguments import NONE, Arguments, Constant, Derived, Slot, resolve_all, with_member
from fastlora.kernels.core.execution import refuse_second_derivative
from fastlora.kernels.core.implementations import Implementation
from fastlora.kernels.core.quantized_weight import dequantized
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.kernels.core.trace import trace

Tensors = tuple[torch.Tensor, ...]
MaybeTensors = tuple["torch.Tensor | None", ...]
_is_tensor = partial(is_not, None)

MAX_BACKWARDS = 8
"""Layouts of incoming gradients that a plan keeps a backward for."""


class Traced:
    """A function of tensors of one layout, whose second call is recorded and whose later calls are replayed.

    Args:
        function: takes tensors; returns its result, and the implementation that computed it.
        records: whether to record at all.
    """

    def __init__(self, function: Callable[..., tuple[Any, Implementation | None]], records: bool) -> None:
        self._function, self._records = function, records
        self._record_next = False
        self._replay: Callable[..., Any] | None = None

    def __call__(self, *tensors: torch.Tensor) -> Any:
        if self._replay is not None:
            result = self._replay(*tensors)
            if result is not NotImplemented:  # such as for tensors that are not aligned
                return result
        if self._record_next:
            self._record_next = False
            result, self._replay = trace(self._result, tensors)
            return result
        result, implementation = self._function(*tensors)
        if self._records:
            self._records, self._record_next = False, implementation is not None and implementation.traceable
        return result

    def _result(self, *tensors: torch.Tensor) -> Any:
        return self._function(*tensors)[0]


class Plan:
    """A plan of calls of an op on tensors of one layout.

    Attributes:
        check: returns whether tensors have this layout.
        is_differentiable: whether autograd has to record the call.
        outputs: the number of outputs among the flat results; 0 before the first call.
        needs: which gradients are needed, by tensor leaf of the op.
        slots: the backward's arguments, as slots of the saved tensors.
        traces: whether calls are recorded and replayed.
        recomputes: whether the backward recomputes residuals that were not saved.
        select: selects the tensors to save from inputs and results.
    """

    def __init__(
        self, op: SemanticOp, arguments: Arguments, tensors: Tensors, numbers: Sequence[Any], traces: bool
    ) -> None:
        self.op, self.traces, self._arguments, self._numbers = op, traces, arguments, numbers
        self.check = calls.layout_check(tensors)
        self.needs = [index is not None and tensors[index].requires_grad for index in arguments.leaves]
        self.is_differentiable = torch.is_grad_enabled() and any(self.needs) and not op.is_constant
        self.outputs = 0
        self._device = tensors[0].device
        self._forward = Traced(self._run_forward, traces)
        self._backwards: dict[Any, list[tuple[Callable[..., bool], PlannedBackward]]] = {}
        self._bytes_not_saved, self.recomputes = 0, False
        self.slots: list[Slot] = []
        self.select: Callable[[Tensors], Tensors] | None = None

    def run(self, function: Callable[..., Any], tensors: Tensors) -> Any:
        """Call a function on tensors without autograd, autocast and function overrides."""
        with compat_dispatch.disable_function_overrides():  # those of 4-bit parameters are slow
            return dispatch.isolated(self._device, function, *tensors)

    def forward(self, tensors: Tensors) -> Tensors:
        """Return outputs and residuals as one flat tuple."""
        results: Tensors = self.run(self._forward, tensors)
        if not self.outputs:
            op = self.op
            if self.is_differentiable:
                self._choose_saved(tensors, results)
            # set last, since it tells other threads that the plan is complete
            self.outputs = len(op.output_leaves.flat(op.result_leaves.grouped(results)))
        if self._bytes_not_saved and recompute.current.not_saved is not None:
            recompute.current.not_saved.bytes += self._bytes_not_saved
        return results

    def _run_forward(self, *tensors: torch.Tensor) -> tuple[Tensors, Implementation]:
        op = self.op
        named = dict(zip(op.names, resolve_all(self._arguments.slots, (*tensors, *self._numbers)), strict=True))
        if op.policy.grads_in_forward:
            named["wanted"] = op.wanted(self.needs if self.is_differentiable else [False] * len(self.needs))
        implementation = op.implementations.forward(tensors[0], named)
        results: Any = op.result_leaves.flat(implementation.forward(**named))
        return tuple(results), implementation

    # -- what is saved -------------------------------------------------------------------------------------------------

    def _choose_saved(self, tensors: Tensors, results: Tensors) -> None:
        """Determine which tensors to save, and the slots of the backward's arguments.

        Tensors are identified by name, not by identity, since an implementation that is not traceable may return one of
        its arguments in one call and a new tensor in another.
        """
        op = self.op
        values = resolve_all(self._arguments.slots, (*tensors, *self._numbers))
        self.shared = op.shared_gradients(values)
        named = op.named(values, op.result_leaves.grouped(results))
        dropped = op.not_saved(self.needs, named)
        recomputable = () if recompute.current.not_saved is None else op.policy.recomputable
        if recomputable and not dropped:  # everything that they are recomputed from is saved
            self.recomputes, dropped = True, set(recomputable)
            self._bytes_not_saved = sum(named[name].nbytes for name in recomputable)
        result_slots = range(len(tensors), len(tensors) + len(results))
        by_name = op.named(self._arguments.slots, op.result_leaves.grouped(result_slots))
        for each, source in self._arguments.derived:
            by_name[each.argument] = with_member(by_name[each.argument], each.member, source)
        saved: list[int] = []
        slots = [
            _none_slot(by_name[a.name]) if a.name in dropped else self._saved_slot(by_name[a.name], saved)
            for a in op.saved
        ]
        self.slots = [*slots, *map(Constant, op.constants_of(named))]
        self.select = _selector(saved)

    def _saved_slot(self, slot: Slot, saved: list[int]) -> Slot:
        """Translate a slot of inputs and results to one of saved tensors, whose indices are appended to `saved`."""
        if isinstance(slot, Derived):
            return Derived(slot.source, [self._saved_slot(each, saved) for each in slot.values], slot.quantized)
        if isinstance(slot, list):
            return [self._saved_slot(each, saved) for each in slot]
        if not isinstance(slot, int):
            return slot
        if slot < 0:
            return Constant(self._numbers[slot])
        return _saved_index(slot, saved)

    # -- backward ------------------------------------------------------------------------------------------------------

    def backward(self, saved: Tensors, grads: MaybeTensors, others_read: bool) -> MaybeTensors:
        """Return the gradients of the call's input tensors.

        Args:
            saved: the saved tensors.
            grads: the incoming gradients.
            others_read: whether anything else may read the saved tensors, such as hooks that packed them.
        """
        present = grads if all(map(_is_tensor, grads)) else tuple(filter(_is_tensor, grads))
        if not present:
            return (None,) * self._arguments.tensors
        tensors: Tensors = (*present, *saved)  # type: ignore[arg-type]
        if compat_dispatch.dispatch_modes() or compat_dispatch.functorch_interpreter() is not None:
            return PlannedBackward(self, grads, may_overwrite=False).through_dispatcher(tensors)
        others_read = calls.keeps_graph() or (others_read and not self.recomputes)
        key = (present is grads or tuple(map(_is_tensor, grads)), others_read)
        planned = next((each for check, each in self._backwards.get(key, ()) if check(*tensors)), None)
        if planned is None:
            planned = PlannedBackward(self, grads, may_overwrite=not others_read)
            if not dispatch.can_bypass_dispatcher(tensors):
                return planned.through_dispatcher(tensors)
            check = calls.layout_check(tensors)
            if check(*tensors) and len(known := self._backwards.setdefault(key, [])) < MAX_BACKWARDS:
                known.append((check, planned))
        found: MaybeTensors = dispatch.profiled(f"{self.op.name}_backward", self.run, planned.compute, tensors)
        return found

    def to_inputs(self, gradients: Sequence[torch.Tensor | None]) -> MaybeTensors:
        """Convert the gradients of the op's tensor leaves to those of the call's input tensors."""
        found: list[torch.Tensor | None] = [None] * self._arguments.tensors
        for index, gradient in zip(self._arguments.leaves, gradients, strict=True):
            if index is not None and gradient is not None:
                before = found[index]
                found[index] = gradient if before is None else before + gradient
        return tuple(found)


class PlannedBackward:
    """The backward of a plan, for incoming gradients of one layout.

    Attributes:
        compute: takes the incoming gradients that are not None, then the saved tensors; returns the gradients of
        inputs.
    """

    def __init__(self, plan: Plan, grads: MaybeTensors, may_overwrite: bool) -> None:
        op = plan.op
        self._plan, self._may_overwrite = plan, may_overwrite
        self._present = [g is not None for g in grads]
        self._count = sum(self._present)
        self._needs = op.reachable(plan.needs, grads)
        self._to_compute = plan.shared.to_compute(self._needs)
        self._wanted = op.wanted(self._to_compute)
        self.compute = Traced(self._compute, plan.traces)

    def _split(self, tensors: Tensors) -> tuple[list[torch.Tensor | None], list[Any]]:
        incoming = iter(tensors)
        grads = [next(incoming) if present else None for present in self._present]
        return grads, resolve_all(self._plan.slots, tensors[self._count :])

    def _compute(self, *tensors: torch.Tensor) -> tuple[MaybeTensors, Implementation | None]:
        op, plan = self._plan.op, self._plan
        grads, values = self._split(tensors)
        computed: list[torch.Tensor] = []
        implementation = None
        if any(self._to_compute):
            named = dict(zip(op.backward_names, values, strict=True))
            if plan.recomputes:
                named |= recompute.restore(op, named, tensors[0])
            named["wanted"], named["grads"] = self._wanted, op.output_leaves.grouped(grads)
            if op.policy.grads_in_forward or op.policy.may_overwrite_saved:
                named["may_overwrite"] = self._may_overwrite
            implementation = op.implementations.backward(tensors[0], named)
            assert implementation.backward is not None
            flat = op.leaves.flat_gradients(implementation.backward(**named), self._wanted)
            computed = [g for g, is_computed in zip(flat, self._to_compute, strict=True) if is_computed]
        gradients = plan.shared.distribute(computed, self._to_compute, self._needs, grads[0])
        return plan.to_inputs(gradients), implementation

    def through_dispatcher(self, tensors: Tensors) -> MaybeTensors:
        """Return the gradients of inputs by the registered operator, which modes and subclasses can intercept."""
        op, plan = self._plan.op, self._plan
        grads, values = self._split(tensors)
        computed: Sequence[torch.Tensor] = ()
        if any(self._to_compute):
            if plan.recomputes:
                named = dict(zip(op.backward_names, values, strict=True))
                restored = plan.run(lambda *_: recompute.restore(op, named, tensors[0]), tensors)
                values = list((named | restored).values())
            computed = op.backward_target(grads, self._to_compute, *dequantized(values))
        return plan.to_inputs(plan.shared.distribute(computed, self._to_compute, self._needs, grads[0]))


class PlannedCall(torch.autograd.Function):
    """Connects the forward of a plan with its backward."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: torch.Tensor) -> Any:
        results = plan.forward(tensors)
        assert plan.select is not None
        ctx.plan, ctx.others_read = plan, saved_tensors_hooks(True) is not None
        ctx.save_for_backward(*plan.select((*tensors, *results)))
        ctx.set_materialize_grads(False)
        return results[: plan.outputs]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        plan: Plan = ctx.plan
        if torch.is_grad_enabled():
            refuse_second_derivative(plan.op.name)
        return (None, *plan.backward(ctx.saved_tensors, grads, ctx.others_read))


def _none_slot(slot: Slot) -> Slot:
    """Return a slot of None, or of a list of as many None as `slot` has members."""
    return [NONE] * len(slot) if isinstance(slot, list) else NONE


def _saved_index(index: int, saved: list[int]) -> int:
    """Return the position of `index` in `saved`, to which it is appended if missing."""
    if index not in saved:
        saved.append(index)
    return saved.index(index)


def _selector(indices: Sequence[int]) -> Callable[[Tensors], Tensors]:
    """Return a function that selects the elements of a tuple at these indices, as a tuple."""
    if len(indices) > 1:
        return itemgetter(*indices)
    return itemgetter(slice(indices[0], indices[0] + 1)) if indices else itemgetter(slice(0, 0))
