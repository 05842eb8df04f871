"""Checks of a pattern by itself: unknown operations and arguments, predicates that cannot be called, equal
alternatives, names that are bound twice.

`rule_lint.py` checks how a rule uses its pattern.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any

import torch

from fastlora.errors import suggestion
from fastlora.graph.canonical_ops import operations, seen_instead, signature_of
from fastlora.graph.readers import POWERS
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.match.combinators import Cast, Either, Kept, Raised, Var
from fastlora.match.pattern import ANYTHING, COMMUTATIVE, ConstantCheck, Literal, Named, Op, Pattern
from fastlora.match.predicates import Param
from fastlora.match.seeded_dropout import Seeded

_CONSTANTS = (
    type(None), bool, int, float, complex, str, slice, type(Ellipsis),
    torch.dtype, torch.device, torch.layout, torch.memory_format,
)  # fmt: skip


def subpatterns(pattern: Any) -> list[Any]:
    """Return the pattern and all its parts, each once, outermost first, including parts that are not patterns."""
    found: dict[int, Any] = {}

    def visit(part: Any) -> None:
        if id(part) not in found:
            found[id(part)] = part
            for inner in _children(part):
                visit(inner)

    visit(pattern)
    return list(found.values())


def _children(pattern: Any) -> tuple[Any, ...]:
    if isinstance(pattern, Kept):
        return (pattern.shape,)
    return pattern.children() if isinstance(pattern, Pattern) else ()


def faults(pattern: Any) -> Iterator[str]:
    """Yield what is wrong with each part of a pattern by itself."""
    for part in subpatterns(pattern):
        if not isinstance(part, Pattern):
            yield f"{part!r} is not a pattern"
        for kind, check in _CHECKS.items():
            if isinstance(part, kind):
                yield from check(part)


def accepts_positional(function: Callable[..., Any], count: int) -> bool:
    """Return whether a callable takes `count` positional arguments, as far as its signature shows."""
    try:
        inspect.signature(function).bind(*range(count))
    except TypeError:
        return False
    except ValueError:  # a builtin that has no signature
        return True
    return True


def unknown_operation(op: Any) -> str | None:
    """Return what is wrong with the name of an operation, or None."""
    if not isinstance(op, str):
        return f"{op!r} is not the name of an operation"
    if (instead := seen_instead(op)) is not None:
        return f"patterns never see {op!r}, but {instead}"
    if signature_of(op) is None:
        known = suggestion(op, operations())
        return f"{op!r} is not an operation: {known}; fastlora.graph.canonical_ops.spell adds others"
    return None


def _op(part: Op) -> Iterator[str]:
    unknown = unknown_operation(part.op)
    signature = None if unknown is not None else signature_of(part.op)
    if signature is None:
        yield str(unknown)
        return
    for name in part.args:
        if name not in signature.names:
            yield f"{part.op} has no argument {name!r}: {suggestion(name, signature.names)}"
    for name in signature.required():
        if name not in part.args:
            yield f"{part.op} has no default for {name!r}: mention it, as a predicate to accept any constant"
    exponent = getattr(part.args.get("exponent"), "value", None)
    if part.op == "pow" and isinstance(exponent, (int, float)) and exponent in POWERS:
        yield f"patterns never see pow with the exponent {exponent!r}, but {POWERS[exponent]}"
    if part.op == "mul" and part.args.get("input") is part.args.get("other"):
        yield "patterns never see mul of a value with itself, but square"


def _literal(part: Literal) -> Iterator[str]:
    if not isinstance(part.value, _CONSTANTS):
        yield f"{part.value!r} is neither a pattern nor a constant of a graph"


def _constant_check(part: ConstantCheck) -> Iterator[str]:
    predicate = part.predicate
    name = getattr(predicate, "__name__", repr(predicate))
    if isinstance(predicate, type):
        yield f"{name} is a type, not a predicate: write lambda value: isinstance(value, {name})"
    elif getattr(predicate, "__module__", "") in (
        "fastlora.match.dsl",
        "fastlora.match.predicates",
    ) and not name.startswith("_"):
        yield f"{name} is not a predicate on a constant: call it if it makes a pattern, or annotate a parameter with it"
    elif not accepts_positional(predicate, 1):
        yield f"the predicate {name} must take one argument, the constant"


def _var(part: Var) -> Iterator[str]:
    predicate = part.predicate
    name = getattr(predicate, "__name__", repr(predicate))
    known = "annotate with Param(n), Scalar, Constant, Opt, or a function of the view and the value"
    if not callable(predicate) and predicate is not None:
        yield f"the annotation {predicate!r} of {part.name!r} is not a predicate: {known}"
    elif isinstance(predicate, type):
        yield f"the annotation {name} of {part.name!r} is a type, not a predicate: {known}"
    elif isinstance(predicate, Param) and not isinstance(predicate.dim, int):
        yield f"the annotation {predicate!r} of {part.name!r} must say how many dimensions there are, as in Param(2)"
    elif predicate is not None and not accepts_positional(predicate, 2):
        yield f"the annotation {name} of {part.name!r} does not take a view and a value: {known}"


def _either(part: Either) -> Iterator[str]:
    if len(part.alternatives) < 2:
        yield f"either has {len(part.alternatives)} alternatives: give it two or more, or leave it out"
    if not all(isinstance(alternative, Pattern) for alternative in part.alternatives.values()):
        return  # reported for the alternative itself
    for (tag, first), (other, later) in combinations(part.alternatives.items(), 2):
        if _canonical_form(first) == _canonical_form(later):
            yield f"the alternatives {tag} and {other} are the same pattern, so {other} is never taken"


def hidden_alternatives(part: Either) -> Iterator[str]:
    """Yield alternatives that an earlier and smaller one hides, in a pattern without other faults."""
    for (tag, first), (other, later) in combinations(part.alternatives.items(), 2):
        may_match_same = ANYTHING in first.roots() or first.roots() & later.roots()
        if may_match_same and first.size() < later.size():
            yield f"the alternative {tag} is smaller than {other} after it, and would hide it"


def _named(part: Named | Kept) -> Iterator[str]:
    if not isinstance(part.name, str) or not part.name.isidentifier():
        yield f"the name {part.name!r} is not an identifier"


def _seeded(part: Seeded) -> Iterator[str]:
    if not callable(part.where) or not accepts_positional(part.where, 2):
        yield f"where={part.where!r} of seeded {part.name!r} does not take a view and a value"


def _raised(part: Raised) -> Iterator[str]:
    if not isinstance(part.op, SemanticOp):
        yield f"raised takes an op of fastlora.kernels.ops, not {part.op!r}"
        return
    if not isinstance(part.prefix, str):
        yield f"the prefix {part.prefix!r} of raised {part.op.name} is not a string"
    for name in part.overrides:
        if name not in part.op.names:
            yield f"{part.op.name} has no argument {name!r}: {suggestion(name, part.op.names)}"


_CHECKS: dict[type[Pattern], Callable[[Any], Iterator[str]]] = {
    Op: _op,
    Literal: _literal,
    ConstantCheck: _constant_check,
    Var: _var,
    Either: _either,
    Named: _named,
    Kept: _named,
    Seeded: _seeded,
    Raised: _raised,
}


def _canonical_form(pattern: Any) -> Any:
    """Return a form to compare patterns by: equal forms match the same values. Names make no difference."""
    if isinstance(pattern, tuple):
        return tuple(map(_canonical_form, pattern))
    if type(pattern) is Op:
        arguments = {name: _canonical_form(value) for name, value in pattern.args.items()}
        if pattern.op in COMMUTATIVE:
            return pattern.op, frozenset(arguments.values())
        return pattern.op, frozenset(arguments.items())
    if isinstance(pattern, Named):
        return _canonical_form(pattern.inner)
    if isinstance(pattern, Cast):
        return "optional cast", pattern.widening, _canonical_form(pattern.inner)
    if isinstance(pattern, Either):
        return "either", tuple(map(_canonical_form, pattern.alternatives.values()))
    if isinstance(pattern, Literal):
        return "constant", type(pattern.value), repr(pattern.value)
    return "itself", id(pattern)


def bound_names(pattern: Pattern) -> set[str]:
    """Return the names to which a match binds values."""
    return {name for part in subpatterns(pattern) for name in _binds(part)}


def alternatives(pattern: Pattern) -> dict[str, set[str]]:
    """Return the alternatives of each named `either`."""
    found: dict[str, set[str]] = {}
    for part in subpatterns(pattern):
        if isinstance(part, Named) and isinstance(part.inner, Either):
            found.setdefault(part.name, set()).update(part.inner.alternatives)
    return found


def _binds(part: Pattern) -> list[str]:
    if isinstance(part, Raised):
        return part.captures()
    return [part.name] if isinstance(part, (Var, Kept, Named)) else []


def name_collisions(pattern: Pattern) -> list[str]:
    """Return the names that one match would bind to two values; alternatives of an `either` may share names.

    The binders of a name in a part are the parts below that bind it. A name collides if two parts of one match bind it
    and have no binder in common.
    """
    cache: dict[int, dict[str, frozenset[Any]]] = {}
    found: dict[str, None] = {}

    def binders_of(part: Pattern) -> dict[str, frozenset[Any]]:
        if id(part) not in cache:
            own = {name: frozenset({name if isinstance(part, Var) else id(part)}) for name in _binds(part)}
            cache[id(part)] = merge([own, *map(binders_of, _children(part))], isinstance(part, Either))
        return cache[id(part)]

    def merge(several: list[dict[str, frozenset[Any]]], exclusive: bool) -> dict[str, frozenset[Any]]:
        total: dict[str, frozenset[Any]] = {}
        for each in several:
            for name, binders in each.items():
                if name in total and not exclusive and not total[name] & binders:
                    found[name] = None
                total[name] = total.get(name, frozenset()) | binders
        return total

    binders_of(pattern)
    return list(found)
