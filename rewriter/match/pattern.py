"""Patterns of subgraphs, written as the formulas that they compute.

    h = cast(x)
    n = h * rsqrt(mean(h ** 2) + eps)

Arithmetic on patterns builds patterns; `combinators.py` has patterns that are not operations. Each class has a
generator that yields a `State` for each way in which a value matches, so backtracking, commutativity and alternatives
all mean trying the next branch. A failed branch adds a note to the trace, to explain near misses. A sub-pattern that is
used twice must match the same value twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations
from typing import Any

from torch import fx

from fastlora.graph.canonical_ops import signature_of
from fastlora.graph.derived import DerivedValue
from fastlora.graph.readers import POWERS
from fastlora.graph.view import View
from fastlora.match.state import State, Trace, describe, same_value

COMMUTATIVE = {"add", "mul"}
ANYTHING = "*"
"""The root of a pattern that any value may match; see `Pattern.roots`."""
RAISED = "raised."
"""The prefix of a root that is a semantic op, which another rule has raised."""


class Pattern:
    """Base of all patterns; arithmetic on patterns builds patterns."""

    def match(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        """Yield a state for each way in which `value` matches, given the partial match `state`."""
        producer = view.producer(value)
        if id(self) in state.seen:
            if same_value(state.seen[id(self)], producer):
                yield state
            elif trace is not None:
                trace.note(state, f"{describe(value)} is not the same value as {describe(state.seen[id(self)])}")
            return
        for found in self._branches(view, value, state, trace):
            seen = {**found.seen, id(self): producer}
            yield State(found.values, found.members, found.shared, seen, found.tags)  # _replace takes twice as long

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        raise NotImplementedError

    def children(self) -> tuple[Pattern, ...]:
        return ()

    def roots(self) -> set[str]:
        """Return the operations that can be at the root of a match."""
        raise NotImplementedError

    def admits(self, view: View, value: Any) -> bool:
        """Return whether the operation that computes a value can be at the root of a match."""
        roots = self._roots
        if ANYTHING in roots:
            return True
        term = view.term(value)
        return term is not None and term.op in roots

    @cached_property
    def _roots(self) -> frozenset[str]:
        """The roots, or anything if a raised op is among them: a term does not show whether an op was raised there."""
        roots = self.roots()
        return frozenset({ANYTHING}) if any(root.startswith(RAISED) for root in roots) else frozenset(roots)

    def size(self) -> int:
        """Return the number of operations in the largest match."""
        return sum(child.size() for child in self.children())

    def named(self, name: str) -> Pattern:
        """Record the matched value, or the alternative that an `either` took, under a name for `attrs` and `where`."""
        return Named(name, self)

    def __bool__(self) -> bool:
        raise TypeError("a pattern is neither true nor false: it stands for a value; write alternatives with either()")

    def __add__(self, other: Any) -> Pattern:
        return Op("add", input=self, other=other)

    __radd__ = __add__

    def __mul__(self, other: Any) -> Pattern:
        return self**2 if other is self else Op("mul", input=self, other=other)

    __rmul__ = __mul__

    def __sub__(self, other: Any) -> Pattern:
        return Op("sub", input=self, other=other)

    def __truediv__(self, other: Any) -> Pattern:
        return Op("div", input=self, other=other)

    def __rtruediv__(self, other: Any) -> Pattern:
        return Op("div", input=other, other=self)

    def __neg__(self) -> Pattern:
        return Op("neg", input=self)

    def __pow__(self, exponent: float) -> Pattern:
        if isinstance(exponent, (int, float)) and exponent in POWERS:
            return Op(POWERS[exponent], input=self)
        return Op("pow", input=self, exponent=exponent)


@dataclass(eq=False)
class Named(Pattern):
    """Records the value that a sub-pattern has matched, and the alternative that it took."""

    name: str
    inner: Pattern

    def children(self) -> tuple[Pattern, ...]:
        return (self.inner,)

    def roots(self) -> set[str]:
        return self.inner.roots()

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        for found in self.inner.match(view, value, state, trace):
            tag = found.tags.get(str(id(self.inner)))
            tags = {**found.tags, self.name: tag} if tag is not None else found.tags
            yield found._replace(tags=tags, values={**found.values, f".{self.name}": value})


class Op(Pattern):
    """A canonical operation on sub-patterns. An argument may also be a constant or a predicate on one; an argument that
    is left out must have its default, which `fastlora.graph.canonical_ops` declares."""

    def __init__(self, op: str, **args: Any) -> None:
        self.op = op
        self.args = {name: as_pattern(value) for name, value in args.items()}

    def children(self) -> tuple[Pattern, ...]:
        return tuple(p for value in self.args.values() for p in (value if isinstance(value, tuple) else (value,)))

    def roots(self) -> set[str]:
        return {self.op}

    def size(self) -> int:
        return 1 + super().size()

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        term = view.term(value)
        if term is None or term.op != self.op:
            if trace is not None:
                trace.note(state, f"expected {self.op}, found {describe(value, term.op if term else None)}")
            return
        inside = state.including(view.producer(value))
        yield from self._arguments(view, term.args, inside, trace)
        if self.op in COMMUTATIVE:
            swapped = {**term.args, "input": term.args["other"], "other": term.args["input"]}
            yield from self._arguments(view, swapped, inside, trace)
            yield from self._reassociated(view, value, state)

    @cached_property
    def _operands(self) -> tuple[Pattern, ...]:
        """The operands of a chain such as `a * b * c`, whose parts have no names."""
        chained = (
            child._operands if type(child) is Op and child.op == self.op else (child,) for child in self.children()
        )
        return tuple(operand for operands in chained for operand in operands)

    def _reassociated(self, view: View, value: Any, state: State) -> Iterator[State]:
        """Match a chain of three operands or more that is evaluated in another order, such as `a * (b * c)`."""
        count = len(self._operands)
        for operands, nodes in _expansions(view, self.op, [value], (), count) if count > 2 else ():
            inside = state
            for node in nodes:
                inside = inside.including(node)
            for order in permutations(operands):
                yield from match_all(list(zip(self._operands, order, strict=True)), view, inside, None)

    def _arguments(self, view: View, args: dict[str, Any], state: State, trace: Trace | None) -> Iterator[State]:
        pairs: list[tuple[Pattern, Any]] = []
        for name, expected in self.args.items():
            value = args[name]
            if isinstance(expected, tuple):
                if not isinstance(value, (tuple, list)) or len(expected) != len(value):
                    return
                pairs += zip(expected, value, strict=True)
            else:
                pairs.append((expected, value))
        unmentioned = self._unmentioned(args) if len(args) > len(self.args) else None
        if unmentioned is None or trace is not None:
            for found in match_all(pairs, view, state, trace):
                if unmentioned is None:
                    yield found
                elif trace is not None:
                    trace.note(found, unmentioned)

    def _unmentioned(self, args: dict[str, Any]) -> str | None:
        """Return a sentence on an argument that the pattern does not mention and that differs from its default."""
        signature = signature_of(self.op)
        defaults = signature.defaults if signature is not None else {}
        for name, value in args.items():
            if name not in self.args and not (name in defaults and _is_constant(value, defaults[name])):
                return f"{self.op} has {name}={describe(value)}, which the pattern does not mention"
        return None


def _expansions(
    view: View, op: str, operands: list[Any], nodes: tuple[Any, ...], count: int
) -> Iterator[tuple[list[Any], tuple[Any, ...]]]:
    """Yield the ways to read a value as a chain of `count` operands, and the nodes that compute the chain."""
    if len(operands) == count:
        yield operands, nodes
        return
    for i, operand in enumerate(operands):
        term = view.term(operand)
        if term is not None and term.op == op:
            parts = [*operands[:i], term.args["input"], term.args["other"], *operands[i + 1 :]]
            yield from _expansions(view, op, parts, (*nodes, view.producer(operand)), count)


@dataclass(eq=False)
class Literal(Pattern):
    """A constant, such as the 1 of `1 + w`."""

    value: Any

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        if _is_constant(value, self.value):
            yield state
        elif trace is not None:
            trace.note(state, f"expected the constant {self.value!r}, found {describe(value)}")

    def roots(self) -> set[str]:
        return {ANYTHING}


def _is_constant(value: Any, constant: Any) -> bool:
    """Return whether a value equals a constant; 1 equals 1.0, but not True."""
    if isinstance(value, (fx.Node, DerivedValue)) or isinstance(value, bool) != isinstance(constant, bool):
        return False
    return bool(value == constant)


@dataclass(eq=False)
class ConstantCheck(Pattern):
    """An argument that is a constant and satisfies a predicate, such as the bounds of a slice."""

    predicate: Callable[[Any], bool]

    def roots(self) -> set[str]:
        return {ANYTHING}

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        if not isinstance(value, (fx.Node, DerivedValue)) and self.predicate(value):
            yield state


def as_pattern(value: Any) -> Any:
    """Return an argument as a pattern or a tuple of them; a callable is a predicate on a constant."""
    if isinstance(value, Pattern):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(as_pattern(item) for item in value)
    return ConstantCheck(value) if callable(value) else Literal(value)


def match_all(pairs: list[tuple[Pattern, Any]], view: View, state: State, trace: Trace | None) -> Iterator[State]:
    """Yield a state for each way in which all values match their patterns. Without a trace, try nothing if one of the
    values cannot be at the root of its pattern."""
    if trace is not None or all(pattern.admits(view, value) for pattern, value in pairs):
        yield from _match_in_turn(pairs, view, state, trace)


def _match_in_turn(pairs: list[tuple[Pattern, Any]], view: View, state: State, trace: Trace | None) -> Iterator[State]:
    if not pairs:
        yield state
        return
    (pattern, value), *rest = pairs
    for found in pattern.match(view, value, state, trace):
        yield from _match_in_turn(rest, view, found, trace)
