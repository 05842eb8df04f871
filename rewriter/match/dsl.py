"""The pattern language: a pattern is written as the formula that it matches.

    h = widened(x)
    n = h * rsqrt(mean(h ** 2) + eps)

Every operation that `fastlora.graph.canonical_ops` declares has a function of its name here (`silu(x)`, `linear(x, w)`,
`layer_norm(x, shape, weight=w)`), and `Op(name, argument=...)` is the same written out; an argument that is not
mentioned must have its default. `*` and `+` commute; `cast` and `widened` are optional; no-op casts, views, copies and
inactive dropouts are skipped. The capitalized names annotate a rule's parameters, and restrict the values that these
capture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from fastlora.errors import suggestion
from fastlora.graph.canonical_ops import operations, signature_of
from fastlora.graph.fake_values import meta
from fastlora.graph.view import View
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.match.combinators import Cast, Either, Kept, Raised, Var
from fastlora.match.pattern import Op, Pattern
from fastlora.match.predicates import Constant as Constant
from fastlora.match.predicates import Opt as Opt
from fastlora.match.predicates import Param as Param
from fastlora.match.predicates import Scalar as Scalar
from fastlora.match.scaled import Scaled
from fastlora.match.seeded_dropout import Seeded
from fastlora.match.state import Predicate, State, Trace


def __getattr__(name: str) -> Callable[..., Op]:
    """Return the function that builds patterns of a canonical operation, for `from fastlora.pattern import silu`."""
    if name in operations():
        return _builder(name)
    raise AttributeError(f"no canonical operation is called {name!r}: {suggestion(name, operations())}")


@cache
def _builder(name: str) -> Callable[..., Op]:
    def build(*values: Any, **named: Any) -> Op:
        signature = signature_of(name)
        names = signature.names if signature is not None else ()
        if len(values) > len(names):
            raise TypeError(f"{name} takes the arguments {signature}, not {len(values)} of them")
        return Op(name, **dict(zip(names, values, strict=False)), **named)

    build.__name__ = name
    build.__doc__ = f"The canonical operation `{name}`."
    return build


def either(**alternatives: Any) -> Pattern:
    """Match the first alternative that fits; write larger ones first. `.named(n)` records which one was taken."""
    return Either(**alternatives)


def cast(inner: Pattern) -> Pattern:
    """Match an optional cast of `inner`. If it may round, the op must round as well: name it for `attrs`."""
    return Cast(inner)


def widened(inner: Pattern) -> Pattern:
    """Match an optional cast that is exact, which an op may skip."""
    return Cast(inner, widening=True)


def scaled(inner: Pattern, scaling: Var, gain: Var, inside: bool = False) -> Pattern:
    """Match `inner`, or a multiple of it. The product of all numbers is captured as `scaling`, and that of all scalar
    parameters and buffers as `gain`. Several parts of a pattern may share the two."""
    return Scaled(inner, scaling, gain, inside)


def kept(name: str, shape: Pattern) -> Pattern:
    """Capture a value that matches `shape` as `name`, and leave it in the graph."""
    return Kept(name, shape)


def seeded(name: str, x: Pattern, p: Pattern, where: Predicate) -> Pattern:
    """Match an active dropout that the op computes itself, and capture the seed of its mask as `name`.

    It matches only if nothing else uses the output of the dropout, and `where` returns True for it.
    """
    return Seeded(name, x, p, where)


def raised(op: SemanticOp, prefix: str = "", **overrides: Any) -> Pattern:
    """Match a semantic op that a `@rule` has raised. Its arguments are captured as `prefix` + their names, which must
    be arguments of the rule's op; `overrides` gives patterns, constants or predicates for the others."""
    return Raised(op, prefix, **overrides)


def cat(*tensors: Any) -> Pattern:
    """Match a concatenation along the last dimension."""
    return Op("cat", tensors=tensors)


def flatten_pairs(first: Any, second: Any) -> Pattern:
    """Match `stack((first, second), -1).flatten(-2)`, which interleaves the entries of the two."""
    return Op("flatten", input=Op("stack", tensors=(first, second)))


def _anything(constant: Any) -> bool:
    return True


class _HalfOf(Op):
    """A slice of the last dimension whose bounds depend on its size."""

    def __init__(self, x: Pattern, bounds: Callable[[int], tuple[int, int, int]]) -> None:
        super().__init__("slice", input=x, start=_anything, stop=_anything, step=_anything)
        self._bounds = bounds

    def _arguments(self, view: View, args: dict[str, Any], state: State, trace: Trace | None) -> Iterator[State]:
        tensor = meta(args["input"])
        expected = self._bounds(tensor.shape[-1]) if tensor is not None else None
        if expected == (args["start"], args["stop"], args["step"]):
            yield from super()._arguments(view, args, state, trace)
        elif trace is not None:
            trace.note(state, f"expected the slice {expected}, found {(args['start'], args['stop'], args['step'])}")


def first_half(x: Pattern) -> Pattern:
    """Match the first half of the last dimension."""
    return _HalfOf(x, lambda size: (0, size // 2, 1))


def second_half(x: Pattern) -> Pattern:
    """Match the second half of the last dimension."""
    return _HalfOf(x, lambda size: (size // 2, size, 1))


def evens(x: Pattern) -> Pattern:
    """Match the entries 0, 2, 4, ... of the last dimension."""
    return _HalfOf(x, lambda size: (0, size, 2))


def odds(x: Pattern) -> Pattern:
    """Match the entries 1, 3, 5, ... of the last dimension."""
    return _HalfOf(x, lambda size: (1, size, 2))


def piece(x: Pattern, name: str) -> Pattern:
    """Match a contiguous slice of the last dimension, and name it for `match.slice_of`."""
    return Op("slice", input=x, step=1, start=_anything, stop=_anything).named(name)
