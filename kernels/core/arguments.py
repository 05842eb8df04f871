"""Where the tensors and numbers that a call site is given stand among the arguments of its op."""

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
    """A value that is made of others by an op, or stands in for that."""

    source: SemanticOp
    values: list[Any]
    quantized: bool

    def make(self, given: Sequence[Any]) -> Any:
        values = [fill(each, given) for each in self.values]
        if self.quantized:
            return QuantizedWeight(self.source, values)
        return self.source.as_tuple(compute(self.source, values))[0]


Slot = int | list[Any] | Constant | Derived
"""A place among what is given, a list of slots, or how to have the value otherwise."""
NONE = Constant(None)


def fill(slot: Slot, given: Sequence[Any]) -> Any:
    """Return the value that stands in a slot."""
    if type(slot) is int:
        return given[slot]
    if type(slot) is list:
        return [fill(each, given) for each in slot]
    return slot.value if type(slot) is Constant else slot.make(given)  # type: ignore[union-attr]


def fill_all(slots: Sequence[Slot], given: Sequence[Any]) -> list[Any]:
    """Return the values that stand in several slots."""
    return [
        given[slot] if type(slot) is int else slot.value if type(slot) is Constant else fill(slot, given)
        for slot in slots
    ]


class Arguments(NamedTuple):
    """The arguments of an op, in the schema's order, in terms of what its call site is given.

    Attributes:
        slots: where each argument stands.
        leaves: the place of each tensor leaf of the op, None where there is none.
        derived: the derived arguments, each with its slot.
        tensors: how many tensors are given; numbers come after them.
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
    """Tell what varies from call to call from the constants; return the arguments, and what to give a call site.

    Args:
        op: the op.
        values: its arguments in the schema's order.
        derived: arguments that another op makes, with that op's arguments.
        varies: whether a value is no constant.

    Raises:
        ValueError: for a derived argument that the op does not save or, quantized, does not read so.
    """
    found = _Varying(varies)
    slots = found.slots(op.arguments, values)
    flat: Sequence[Any] = op.leaves.flat(slots)
    leaves = [leaf if isinstance(leaf, int) else None for leaf in flat]
    made = []
    for each, of_source in derived:
        _insist(op, each)
        slot = Derived(each.source, found.slots(each.source.arguments, of_source), each.quantized)
        made.append((each, slot))
        if each.quantized:
            at = op.names.index(each.argument)
            slots[at] = with_member(slots[at], each.member, slot)
    given = [*found.tensors, *reversed(found.numbers)]  # numbers are in places counted from the end
    return Arguments(slots, leaves, made, len(found.tensors)), given


class _Varying:
    """The tensors and the numbers that vary, each once."""

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
        place = next((i for i, each in enumerate(found) if each is value), len(found))
        if place == len(found):
            found.append(value)
        return place if is_tensor else -1 - place


def with_member(value: Any, member: int | None, new: Any) -> Any:
    """Return `new` in place of `value`, or the list `value` with `new` in place of one of its members."""
    return new if member is None else [*value[:member], new, *value[member + 1 :]]


def _insist(op: SemanticOp, derived: DerivedArgument) -> None:
    if derived.argument not in (a.name for a in op.saved):
        raise ValueError(f"{op.name} does not save {derived.argument!r}, so there is no need to derive it")
    if derived.quantized and derived.argument not in op.policy.reads_quantized:
        raise ValueError(f"{op.name} does not read {derived.argument!r} quantized")
