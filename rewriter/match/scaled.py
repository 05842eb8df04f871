"""Multiples of a value: the scales of a linear path, wherever they are on it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fastlora.graph.derived import DerivedValue
from fastlora.graph.fake_values import meta
from fastlora.graph.term import is_graph_input
from fastlora.graph.view import View
from fastlora.match.combinators import Var
from fastlora.match.pattern import Pattern
from fastlora.match.predicates import Scalar
from fastlora.match.state import State, Trace, describe


@dataclass(eq=False)
class Scaled(Pattern):
    """`inner`, or a multiple of it: captures the product of all numbers as `scaling`, and that of all scalar tensors
    among the graph's inputs as `gain`. Several parts of a pattern may share the two."""

    inner: Pattern
    scaling: Var
    gain: Var
    inside: bool = False
    """Whether the op scales later than the graph does, which may be beyond the range of float16."""

    def children(self) -> tuple[Pattern, ...]:
        return (self.inner, self.scaling, self.gain)

    def roots(self) -> set[str]:
        return {"mul", "div", "neg"} | self.inner.roots()

    def size(self) -> int:
        return self.inner.size()

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        yield from self.inner.match(view, value, state, trace)
        inside = state.including(view.producer(value))
        is_float16 = (tensor := meta(value)) is not None and tensor.dtype == torch.float16
        for rest, factor in _factors(view, value):
            if is_float16 and (self.inside or _is_scalar_input(view, factor)):
                continue
            scaled = self._times(view, factor, inside)
            if scaled is not None:
                yield from self._branches(view, rest, scaled, trace)
            elif trace is not None:
                for found in self.inner.match(view, rest, inside, None):
                    trace.note(found, f"{describe(factor)} is neither a number nor a scalar parameter")

    def _times(self, view: View, factor: Any, state: State) -> State | None:
        """Return the state with one more factor, or None if it is not a scalar or cannot be joined with the others."""
        if _is_scalar_input(view, factor):
            gain = state.values.get(self.gain.name)
            return state.bind(self.gain.name, factor if gain is None else DerivedValue(torch.mul, (gain, factor)))
        if Scalar(view, factor) is not True:
            return None
        known = state.values.get(self.scaling.name, 1.0)
        if isinstance(known, fx.Node) or isinstance(factor, fx.Node):
            return state.bind(self.scaling.name, factor) if known == 1.0 else None
        return state.bind(self.scaling.name, known * factor)


def _factors(view: View, value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what a value is a multiple of, and the factor."""
    term = view.term(value)
    if term is None:
        return
    if term.op == "neg":
        yield term.args["input"], -1.0
    elif term.op == "mul":
        yield term.args["input"], term.args["other"]
        yield term.args["other"], term.args["input"]
    elif term.op == "div" and isinstance(divisor := term.args["other"], (int, float)) and divisor != 0:
        yield term.args["input"], 1.0 / divisor


def _is_scalar_input(view: View, value: Any) -> bool:
    """Return whether a value is a parameter or buffer without dimensions, so that it scales what it multiplies. None in
    float16 is: a product of two may be beyond its range.
    """
    tensor = meta(value)
    if tensor is None or tensor.dim() != 0 or not tensor.is_floating_point() or tensor.dtype == torch.float16:
        return False
    return is_graph_input(view, value)
