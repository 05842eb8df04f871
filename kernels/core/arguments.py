"""Maps the tensors and numbers that a call site takes to the arguments of its op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fastlora.kernels.core.execution import compute
from fastlora.kernels.core.quantized_weight import QuantizedWeight
from fastlora.kernels.core.schema import Argument
from fastlora.kernels.core.semantic_op import DerivedArgument, SemanticOp


class Constant(NamedTuple):
    """A value that is the same in every call."""

    value: Any


class Derived(NamedTuple):
    """A value that an op computes from others; with `quantized`, a `QuantizedWeight` that computes it when it is
    read."""

    source: SemanticOp
    values: list[Any]
    quantized: bool

    def make(self, given: Sequence[Any]) -> Any:
        values = [resolve(each, given) for each in self.values]
        if self.quantized:
            return QuantizedWeight(self.source, values)
        return self.source.as_tuple(compute(self.source, values))[0]


Slot = int | list[Any] | Constant | Derived
"""Where a value comes from: an index among the call's inputs, a list of slots, a constant, or a derived value."""
NONE = Constant(None)


def resolve(slot: Slot, given: Sequence[Any]) -> Any:
    """Return the value of a slot, for the inputs `given`."""
    if type(slot) is int:
        return given[slot]
    if type(slot) is list:
        return [resolve(each, given) for each in slot]
    return slot.value if type(slot) is Constant else slot.make(given)  # type: ignore[union-attr]


def resolve_all(slots: Sequence[Slot], given: Sequence[Any]) -> list[Any]:
    """Return the values of several slots."""
    return [
        given[slot] if type(slot) is int else slot.value if type(slot) is Constant else resolve(slot, given)
        for slot in slots
    ]


class Arguments(NamedTuple):
    """The arguments of an op in terms of the inputs of its call site: first tensors, then numbers.

    Attributes:
        slots: the slot of each argument, in the schema's order.
        leaves: for each tensor leaf of the op, its index among the inputs; None if it is no input.
        derived: the derived arguments, each with its slot.
        tensors: the number of input tensors.
    """

    slots: list[Slot]
    leaves: list[int | None]
    derived: list[tuple[DerivedArgument, Derived]]
    tensors: int


def bind(
    op: SemanticOp,
    values: Sequence[Any],
    derived: Sequence[tuple[DerivedArgument, Sequence[Any]]],
    varies: Callable[[Any], bool],
) -> tuple[Arguments, list[Any]]:
    """Separate inputs, which vary from call to call, from constants; return the op's arguments, and the inputs.

    Args:
        op: the op.
        values: its arguments in the schema's order.
        derived: arguments that another op computes, with that op's arguments.
        varies: whether a value is an input, not a constant.

    Raises:
        ValueError: for a derived argument that the op does not save or, if it is quantized, does not read quantized.
    """
    found = _Inputs(varies)
    slots = found.slots(op.arguments, values)
    flat: Sequence[Any] = op.leaves.flat(slots)
    leaves = [leaf if isinstance(leaf, int) else None for leaf in flat]
    derived_slots = []
    for each, source_values in derived:
        _check_derived(op, each)
        slot = Derived(each.source, found.slots(each.source.arguments, source_values), each.quantized)
        derived_slots.append((each, slot))
        if each.quantized:
            at = op.names.index(each.argument)
            slots[at] = with_member(slots[at], each.member, slot)
    given = [*found.tensors, *reversed(found.numbers)]  # numbers have negative indices
    return Arguments(slots, leaves, derived_slots, len(found.tensors)), given


class _Inputs:
    """Collects the distinct tensors and numbers that vary."""

    def __init__(self, varies: Callable[[Any], bool]) -> None:
        self.tensors: list[Any] = []
        self.numbers: list[Any] = []
        self._varies = varies

    def slots(self, arguments: Sequence[Argument], values: Sequence[Any]) -> list[Slot]:
        return [self._slot(value, a.is_tensor) for a, value in zip(arguments, values, strict=False)]

    def _slot(self, value: Any, is_tensor: bool) -> Slot:
        if isinstance(value, (list, tuple)) and is_tensor:
            return [self._slot(each, True) for each in value]
        if not self._varies(value):
            return Constant(value)
        found = self.tensors if is_tensor else self.numbers
        index = next((i for i, each in enumerate(found) if each is value), len(found))
        if index == len(found):
            found.append(value)
        return index if is_tensor else -1 - index


def with_member(value: Any, member: int | None, new: Any) -> Any:
    """Return `new`, or the list `value` with `new` as its member at index `member`."""
    return new if member is None else [*value[:member], new, *value[member + 1 :]]


def _check_derived(op: SemanticOp, derived: DerivedArgument) -> None:
    if derived.argument not in (a.name for a in op.saved):
        raise ValueError(f"{op.name} does not save {derived.argument!r}, so there is no need to derive it")
    if derived.quantized and derived.argument not in op.policy.reads_quantized:
        raise ValueError(f"{op.name} does not read {derived.argument!r} quantized")
