"""The pattern language: what a subgraph looks like, written as the formula it computes.

    h = cast(x)
    n = h * rsqrt(mean(h ** 2) + eps)

A pattern is a tree of the classes below. Matching is one generator per class that yields a `State` for each way in
which a value fits; backtracking, commutativity and alternatives are all "try the next branch", and a failed branch
leaves a note, so that a near miss can be explained. A sub-pattern used twice has to match the same value twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import fx

from fastlora.graph.canonical_ops import signature_of
from fastlora.graph.fake_values import meta
from fastlora.graph.readers import POWERS
from fastlora.graph.view import View
from fastlora.kernels.core.semantic_op import SemanticOp

COMMUTATIVE = {"add", "mul"}
ANYTHING = "*"
"""What `roots` answers for a pattern that any value may match."""
RAISED = "raised."
"""What its answer begins with for one that other matches have raised."""

Predicate = Callable[[View, Any], "bool | str"]


class State(NamedTuple):
    """One way to match so far. `members` are the nodes the match would replace; `values` what the captures hold.

    Matching makes a hundred of these for each node, and nobody changes one: a tuple is the cheapest of that kind.
    """

    values: Mapping[str, Any] = MappingProxyType({})
    members: tuple[fx.Node, ...] = ()
    shared: tuple[fx.Node, ...] = ()
    seen: Mapping[int, Any] = MappingProxyType({})
    tags: Mapping[str, str] = MappingProxyType({})

    def bind(self, name: str, value: Any) -> State:
        return State({**self.values, name: value}, self.members, self.shared, self.seen, self.tags)


@dataclass
class Trace:
    """Collects why branches failed; the deepest failure is the one worth telling."""

    notes: list[tuple[tuple[fx.Node, ...], str]] = field(default_factory=list)

    def note(self, state: State, reason: str) -> None:
        self.notes.append((state.members, reason))


class Pattern:
    """Base of all patterns; arithmetic on patterns builds patterns."""

    def match(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        """All the ways in which `value` fits, given what has been matched."""
        producer = view.producer(value)
        if id(self) in state.seen:
            if _same(state.seen[id(self)], producer):
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
        """The operations that can stand at the top of a match."""
        raise NotImplementedError

    def admits(self, view: View, value: Any) -> bool:
        """Whether the value is of an operation that can stand at the top of a match."""
        roots = self._roots
        if ANYTHING in roots:
            return True
        term = view.term(value)
        return term is not None and term.op in roots

    @cached_property
    def _roots(self) -> frozenset[str]:
        """Of what is raised it is the view that knows where it stands."""
        roots = self.roots()
        return frozenset({ANYTHING}) if any(root.startswith(RAISED) for root in roots) else frozenset(roots)

    def size(self) -> int:
        """The number of operations in the largest match."""
        return sum(child.size() for child in self.children())

    def named(self, name: str) -> Pattern:
        """Records the matched value (or the alternative taken, for `either`) under a name for `attrs` and `where`."""
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
class Var(Pattern):
    """A capture: any value that meets the predicate, and the same value wherever the name appears."""

    name: str
    predicate: Predicate | None = None
    optional: bool = False

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        if self.name in state.values:  # the same name through another pattern object
            if _same(view.producer(state.values[self.name]), view.producer(value)):
                yield state
            return
        verdict = self.predicate(view, value) if self.predicate is not None else meta(value) is not None
        if verdict is True or (value is None and self.optional):
            yield state.bind(self.name, value)
        elif trace is not None:
            trace.note(
                state, verdict if isinstance(verdict, str) else f"{self.name}: {describe(value)} is not a tensor"
            )

    def roots(self) -> set[str]:
        return {ANYTHING}


@dataclass(eq=False)
class Literal(Pattern):
    """A constant that has to be there, e.g. the 1 of `1 + w`."""

    value: Any

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        if _is_constant(value, self.value):
            yield state
        elif trace is not None:
            trace.note(state, f"expected the constant {self.value!r}, found {describe(value)}")

    def roots(self) -> set[str]:
        return {ANYTHING}


def _is_constant(value: Any, wanted: Any) -> bool:
    """Whether a value is that constant; 1 is 1.0, but not True."""
    if isinstance(value, fx.Node) or isinstance(value, bool) != isinstance(wanted, bool):
        return False
    return bool(value == wanted)


class Op(Pattern):
    """A canonical operation on sub-patterns; an argument may also be a predicate or a plain constant, and one that is
    left out has to have its default, which `fastlora.graph.canonical_ops` knows."""

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
        inside = state._replace(members=(*state.members, view.producer(value)))
        yield from self._arguments(view, term.args, inside, trace)
        if self.op in COMMUTATIVE:
            swapped = {**term.args, "input": term.args["other"], "other": term.args["input"]}
            yield from self._arguments(view, swapped, inside, trace)

    def _arguments(self, view: View, args: dict[str, Any], state: State, trace: Trace | None) -> Iterator[State]:
        pairs: list[tuple[Pattern, Any]] = []
        for name, wanted in self.args.items():
            value = args[name]
            if isinstance(wanted, tuple):
                if not isinstance(value, (tuple, list)) or len(wanted) != len(value):
                    return
                pairs += zip(wanted, value, strict=True)
            else:
                pairs.append((wanted, value))
        unwanted = self._unwanted(args) if len(args) > len(self.args) else None
        if unwanted is None or trace is not None:
            for found in _match_all(pairs, view, state, trace):
                if unwanted is None:
                    yield found
                elif trace is not None:
                    trace.note(found, unwanted)

    def _unwanted(self, args: dict[str, Any]) -> str | None:
        """What the pattern does not mention and is not at its default, or None."""
        signature = signature_of(self.op)
        defaults = signature.defaults if signature is not None else {}
        for name, value in args.items():
            if name not in self.args and not (name in defaults and _is_constant(value, defaults[name])):
                return f"{self.op} has {name}={describe(value)}, which the pattern does not mention"
        return None


@dataclass(eq=False)
class Cast(Pattern):
    """An optional change of dtype; `widening` ones lose nothing, others round, which is then the op's business."""

    inner: Pattern
    widening: bool = False

    def children(self) -> tuple[Pattern, ...]:
        return (self.inner,)

    def roots(self) -> set[str]:
        return {"cast"} | self.inner.roots()

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        term = view.term(value)
        if term is not None and term.op == "cast" and (not self.widening or _widens(term.args["input"], value)):
            producer = view.producer(value)
            # A cast of a captured value is cheap: if others use it too, it stays for them.
            kept = (*state.shared, producer) if isinstance(self.inner, Var) else state.shared
            inside = state._replace(members=(*state.members, producer), shared=kept)
            yield from self.inner.match(view, term.args["input"], inside, trace)
        yield from self.inner.match(view, value, state, trace)


def _widens(source: Any, result: Any) -> bool:
    before, after = meta(source), meta(result)
    return before is not None and after is not None and torch.promote_types(before.dtype, after.dtype) == after.dtype


class Either(Pattern):
    """The first alternative that fits, larger ones first."""

    def __init__(self, **alternatives: Any) -> None:
        self.alternatives = {tag: as_pattern(p) for tag, p in alternatives.items()}

    def children(self) -> tuple[Pattern, ...]:
        return tuple(self.alternatives.values())

    def roots(self) -> set[str]:
        return set().union(*(p.roots() for p in self.alternatives.values()))

    def size(self) -> int:
        return max(p.size() for p in self.alternatives.values())

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        for tag, alternative in self.alternatives.items():
            for found in alternative.match(view, value, state, trace):
                yield found._replace(tags={**found.tags, str(id(self)): tag})


@dataclass(eq=False)
class Named(Pattern):
    """Remembers what a sub-pattern matched, and which alternative."""

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


@dataclass(eq=False)
class Kept(Pattern):
    """A value that has to look like `shape` but stays in the graph, e.g. a dropout whose mask must not change."""

    name: str
    shape: Pattern

    def roots(self) -> set[str]:
        return {ANYTHING}

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        for found in self.shape.match(view, value, state, trace):
            yield found._replace(members=state.members, shared=state.shared).bind(self.name, value)


class Raised(Pattern):
    """A semantic op that an earlier rule found. Its arguments are captured under `prefix` + their names, except those
    given as patterns."""

    def __init__(self, op: SemanticOp, prefix: str = "", **overrides: Any) -> None:
        self.op, self.prefix = op, prefix
        self.overrides = {name: as_pattern(p) for name, p in overrides.items()}

    def children(self) -> tuple[Pattern, ...]:
        return tuple(self.overrides.values())

    def roots(self) -> set[str]:
        return {f"{RAISED}{self.op.name}"}

    def size(self) -> int:
        return 1 + super().size()

    def captures(self) -> list[str]:
        return [self.prefix + a.name for a in self.op.arguments if a.name not in self.overrides]

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        matches = view.raised.get(view.producer(value), ()) if isinstance(value, fx.Node) else ()
        for raised in matches:
            if raised.op is not self.op:
                continue
            captured = {self.prefix + n: v for n, v in raised.arguments.items() if n not in self.overrides}
            inside = state._replace(
                members=(*state.members, *raised.members),
                shared=(*state.shared, *raised.shared),
                values={**state.values, **captured},
            )
            pairs = [(pattern, raised.arguments.get(name)) for name, pattern in self.overrides.items()]
            yield from _match_all(pairs, view, inside, trace)
        if not matches and trace is not None:
            trace.note(state, f"expected a {self.op.name}, found {describe(value)}")


def _match_all(pairs: list[tuple[Pattern, Any]], view: View, state: State, trace: Trace | None) -> Iterator[State]:
    """All the ways in which each value fits its pattern. If one is of no operation that its pattern could begin with,
    none is tried, unless somebody wants to know how far the others would have come."""
    if trace is not None or all(pattern.admits(view, value) for pattern, value in pairs):
        yield from _match_in_turn(pairs, view, state, trace)


def _match_in_turn(pairs: list[tuple[Pattern, Any]], view: View, state: State, trace: Trace | None) -> Iterator[State]:
    if not pairs:
        yield state
        return
    (pattern, value), *rest = pairs
    for found in pattern.match(view, value, state, trace):
        yield from _match_in_turn(rest, view, found, trace)


@dataclass(eq=False)
class Checked(Pattern):
    """An argument that is a constant and meets a predicate, e.g. the bounds of a slice."""

    predicate: Callable[[Any], bool]

    def roots(self) -> set[str]:
        return {ANYTHING}

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        if not isinstance(value, fx.Node) and self.predicate(value):
            yield state


def as_pattern(value: Any) -> Any:
    """What an argument of a pattern stands for: one or several patterns, a predicate on a constant, or the constant."""
    if isinstance(value, Pattern):
        return value
    if isinstance(value, (tuple, list)):
        return tuple(as_pattern(item) for item in value)
    return Checked(value) if callable(value) else Literal(value)


def _same(left: Any, right: Any) -> bool:
    return left is right if isinstance(left, fx.Node) or isinstance(right, fx.Node) else bool(left == right)


def describe(value: Any, op: str | None = None) -> str:
    """A value as the report names it."""
    if not isinstance(value, fx.Node):
        return repr(value)
    if op is None:
        op = "a graph input" if value.op == "placeholder" else getattr(value.target, "__name__", str(value.target))
    return f"{op} ({value.name})"
