"""What a call of an op does on tensors of one layout: how it runs, what it saves, which gradients it computes."""

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
from fastlora.kernels.core.arguments import NONE, Arguments, Constant, Derived, Slot, fill_all, with_member
from fastlora.kernels.core.execution import refuse_second_derivative
from fastlora.kernels.core.implementations import Implementation
from fastlora.kernels.core.quantized_weight import dequantized
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.kernels.core.trace import trace

Tensors = tuple[torch.Tensor, ...]
MaybeTensors = tuple["torch.Tensor | None", ...]
_is_tensor = partial(is_not, None)

MOST_BACKWARDS = 8
"""Layouts of incoming gradients that a plan knows for the same outputs."""


class Traced:
    """A function of tensors of one layout: its second call is recorded, and later ones run what was recorded.

    Args:
        function: takes tensors; returns its result, and the implementation that has computed it.
        records: whether to record at all.
    """

    def __init__(self, function: Callable[..., tuple[Any, Implementation | None]], records: bool) -> None:
        self._function, self._records = function, records
        self._is_next = False
        self._replay: Callable[..., Any] | None = None

    def __call__(self, *tensors: torch.Tensor) -> Any:
        if self._replay is not None:
            result = self._replay(*tensors)
            if result is not NotImplemented:  # as for tensors that begin at other addresses than those recorded
                return result
        if self._is_next:
            self._is_next = False
            result, self._replay = trace(self._result, tensors)
            return result
        result, implementation = self._function(*tensors)
        if self._records:
            self._records, self._is_next = False, implementation is not None and implementation.traceable
        return result

    def _result(self, *tensors: torch.Tensor) -> Any:
        return self._function(*tensors)[0]


class Plan:
    """A call of an op on tensors of one layout.

    Attributes:
        check: whether other tensors are of this layout.
        is_differentiable: whether autograd has to know of the call.
        outputs: the number of outputs among the results, which come as one flat tuple.
        needs: which gradients are needed, by tensor leaf of the op.
        slots: where the arguments of the backward stand among what is saved.
        traces: whether what runs is recorded.
    """

    def __init__(
        self, op: SemanticOp, arguments: Arguments, tensors: Tensors, numbers: Sequence[Any], traces: bool
    ) -> None:
        self.op, self.traces, self._arguments, self._numbers = op, traces, arguments, numbers
        self.check = calls.layout_check(tensors)
        self.needs = [place is not None and tensors[place].requires_grad for place in arguments.leaves]
        self.is_differentiable = torch.is_grad_enabled() and any(self.needs) and not op.is_constant
        self.outputs = 0
        self._device = tensors[0].device
        self._forward = Traced(self._run_forward, traces)
        self._backwards: dict[Any, list[tuple[Callable[..., bool], PlannedBackward]]] = {}
        self._bytes_not_saved, self.recomputes = 0, False
        self.slots: list[Slot] = []
        self.select: Callable[[Tensors], Tensors] | None = None

    def run(self, function: Callable[..., Any], tensors: Tensors) -> Any:
        """Call a function on tensors as ops are run."""
        with compat_dispatch.disable_function_overrides():  # those of 4-bit parameters take long
            return dispatch.isolated(self._device, function, *tensors)

    def forward(self, tensors: Tensors) -> Tensors:
        """Return outputs and residuals as one flat tuple."""
        results: Tensors = self.run(self._forward, tensors)
        if not self.outputs:
            op = self.op
            if self.is_differentiable:
                self._choose_saved(tensors, results)
            self.outputs = len(op.output_leaves.flat(op.result_leaves.grouped(results)))  # last: others may wait for it
        if self._bytes_not_saved and recompute.current.not_saved is not None:
            recompute.current.not_saved.bytes += self._bytes_not_saved
        return results

    def _run_forward(self, *tensors: torch.Tensor) -> tuple[Tensors, Implementation]:
        op = self.op
        named = dict(zip(op.names, fill_all(self._arguments.slots, (*tensors, *self._numbers)), strict=True))
        if op.policy.grads_in_forward:
            named["wanted"] = op.wanted(self.needs if self.is_differentiable else [False] * len(self.needs))
        implementation = op.implementations.forward(tensors[0], named)
        results: Any = op.result_leaves.flat(implementation.forward(**named))
        return tuple(results), implementation

    # -- what is saved -------------------------------------------------------------------------------------------------

    def _choose_saved(self, tensors: Tensors, results: Tensors) -> None:
        """Find out which tensors to save, and where they stand among the arguments of the backward.

        That goes by names and not by tensors: an implementation that does not always make the same calls may return
        one of its arguments in one call and a new tensor in another.
        """
        op = self.op
        values = fill_all(self._arguments.slots, (*tensors, *self._numbers))
        self.shared = op.shared_gradients(values)
        named = op.named(values, op.result_leaves.grouped(results))
        dropped = op.not_saved(self.needs, named)
        recomputable = () if recompute.current.not_saved is None else op.policy.recomputable
        if recomputable and not dropped:  # all that they are made of is saved
            self.recomputes, dropped = True, set(recomputable)
            self._bytes_not_saved = sum(named[name].nbytes for name in recomputable)
        own = range(len(tensors), len(tensors) + len(results))
        places = op.named(self._arguments.slots, op.result_leaves.grouped(own))
        for each, source in self._arguments.derived:
            places[each.argument] = with_member(places[each.argument], each.member, source)
        kept: list[int] = []
        slots = [_emptied(places[a.name]) if a.name in dropped else self._moved(places[a.name], kept) for a in op.saved]
        self.slots = [*slots, *map(Constant, op.constants_of(named))]
        self.select = _picker(kept)

    def _moved(self, slot: Slot, kept: list[int]) -> Slot:
        """A slot among what the call was given, as one among what it saves; the tensors that it needs join `kept`."""
        if isinstance(slot, Derived):
            return Derived(slot.source, [self._moved(each, kept) for each in slot.values], slot.quantized)
        if isinstance(slot, list):
            return [self._moved(each, kept) for each in slot]
        if not isinstance(slot, int):
            return slot
        if slot < 0:
            return Constant(self._numbers[slot])
        return _place(slot, kept)

    # -- backward ------------------------------------------------------------------------------------------------------

    def backward(self, saved: Tensors, grads: MaybeTensors, others_read: bool) -> MaybeTensors:
        """Return the gradients of the tensors that the call was given.

        Args:
            saved: what was saved.
            grads: the incoming gradients.
            others_read: whether others may read what was saved, as hooks that packed it may.
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
            if check(*tensors) and len(known := self._backwards.setdefault(key, [])) < MOST_BACKWARDS:
                known.append((check, planned))
        found: MaybeTensors = dispatch.profiled(f"{self.op.name}_backward", self.run, planned.compute, tensors)
        return found

    def by_place(self, gradients: Sequence[torch.Tensor | None]) -> MaybeTensors:
        """Return the gradients of the op's tensor leaves as those of the tensors that the call was given."""
        found: list[torch.Tensor | None] = [None] * self._arguments.tensors
        for place, gradient in zip(self._arguments.leaves, gradients, strict=True):
            if place is not None and gradient is not None:
                before = found[place]
                found[place] = gradient if before is None else before + gradient
        return tuple(found)


class PlannedBackward:
    """The backward of a plan, for incoming gradients of one layout.

    Attributes:
        compute: takes the incoming gradients that there are, then what was saved.
    """

    def __init__(self, plan: Plan, grads: MaybeTensors, may_overwrite: bool) -> None:
        op = plan.op
        self._plan, self._may_overwrite = plan, may_overwrite
        self._present = [g is not None for g in grads]
        self._count = sum(self._present)
        self._needs = op.reachable(plan.needs, grads)
        self._asked = plan.shared.to_compute(self._needs)
        self._wanted = op.wanted(self._asked)
        self.compute = Traced(self._compute, plan.traces)

    def _split(self, tensors: Tensors) -> tuple[list[torch.Tensor | None], list[Any]]:
        incoming = iter(tensors)
        grads = [next(incoming) if there else None for there in self._present]
        return grads, fill_all(self._plan.slots, tensors[self._count :])

    def _compute(self, *tensors: torch.Tensor) -> tuple[MaybeTensors, Implementation | None]:
        op, plan = self._plan.op, self._plan
        grads, values = self._split(tensors)
        computed: list[torch.Tensor] = []
        implementation = None
        if any(self._asked):
            named = dict(zip(op.backward_names, values, strict=True))
            if plan.recomputes:
                named |= recompute.restore(op, named, tensors[0])
            named["wanted"], named["grads"] = self._wanted, op.output_leaves.grouped(grads)
            if op.policy.grads_in_forward or op.policy.may_overwrite_saved:
                named["may_overwrite"] = self._may_overwrite
            implementation = op.implementations.backward(tensors[0], named)
            assert implementation.backward is not None
            flat = op.leaves.of_gradients(implementation.backward(**named), self._wanted)
            computed = [g for g, ask in zip(flat, self._asked, strict=True) if ask]
        return plan.by_place(plan.shared.hand_out(computed, self._asked, self._needs, grads[0])), implementation

    def through_dispatcher(self, tensors: Tensors) -> MaybeTensors:
        """Return the gradients by the registered operator, which modes and subclasses see."""
        op, plan = self._plan.op, self._plan
        grads, values = self._split(tensors)
        computed: Sequence[torch.Tensor] = ()
        if any(self._asked):
            if plan.recomputes:
                named = dict(zip(op.backward_names, values, strict=True))
                restored = plan.run(lambda *_: recompute.restore(op, named, tensors[0]), tensors)
                values = list((named | restored).values())
            computed = op.backward_target(grads, self._asked, *dequantized(values))
        return plan.by_place(plan.shared.hand_out(computed, self._asked, self._needs, grads[0]))


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


def _emptied(slot: Slot) -> Slot:
    """A slot for nothing, or for as many as there are in a list."""
    return [NONE] * len(slot) if isinstance(slot, list) else NONE


def _place(at: int, kept: list[int]) -> int:
    """Where the tensor `at` a place of the pool stands among those kept, which it joins."""
    if at not in kept:
        kept.append(at)
    return kept.index(at)


def _picker(places: Sequence[int]) -> Callable[[Tensors], Tensors]:
    """A function that picks these places of a tuple, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return itemgetter(slice(places[0], places[0] + 1)) if places else itemgetter(slice(0, 0))
