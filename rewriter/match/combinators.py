"""Patterns that are not operations: captures, alternatives, optional casts, and ops that other rules have raised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fastlora.graph.derived import DerivedValue
from fastlora.graph.fake_values import meta
from fastlora.graph.view import View
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.match.pattern import ANYTHING, RAISED, Pattern, as_pattern, match_all
from fastlora.match.state import Predicate, State, Trace, describe, same_value


@dataclass(eq=False)
class Var(Pattern):
    """A capture: any value that satisfies the predicate, and the same value wherever the name appears."""

    name: str
    predicate: Predicate | None = None
    optional: bool = False

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        if self.name in state.values:  # the same name through another pattern object
            if same_value(view.producer(state.values[self.name]), view.producer(value)):
                yield state
            return
        if isinstance(value, DerivedValue) and not value.may_be_argument:
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
class Cast(Pattern):
    """An optional cast, which is exact if `widening`; any other may round, and the op must round in the same way."""

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
            # A cast of a captured value is cheap, so it stays in the graph if other nodes use it.
            shared = (*state.shared, producer) if isinstance(self.inner, Var) else state.shared
            inside = state.including(producer)._replace(shared=shared)
            yield from self.inner.match(view, term.args["input"], inside, trace)
        yield from self.inner.match(view, value, state, trace)


def _widens(source: Any, result: Any) -> bool:
    before, after = meta(source), meta(result)
    return before is not None and after is not None and torch.promote_types(before.dtype, after.dtype) == after.dtype


class Either(Pattern):
    """The first alternative that fits."""

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
class Kept(Pattern):
    """A value that matches `shape` but stays in the graph, such as a dropout whose mask must not change."""

    name: str
    shape: Pattern

    def roots(self) -> set[str]:
        return {ANYTHING}

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        for found in self.shape.match(view, value, state, trace):
            yield found._replace(members=state.members, shared=state.shared).bind(self.name, value)


class Raised(Pattern):
    """A semantic op that another rule has raised. Its arguments are captured as `prefix` + their names, except those in
    `overrides`."""

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
            yield from match_all(pairs, view, inside, trace)
        if not matches and trace is not None:
            trace.note(state, f"expected a {self.op.name}, found {describe(value)}")
