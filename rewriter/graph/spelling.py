"""What a canonical operation is, how it is declared and spelled, and what the calls of a graph mean by that.

The declarations are in `fastlora.graph.canonical_ops`, from which everything here is to be imported.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from fastlora.compat.dispatch import OpOverload, OpOverloadPacket
from fastlora.errors import RuleError, written_at
from fastlora.graph.signature import Signature, merge, parse
from fastlora.graph.term import Reader, Term, Terms

Target = Callable[..., Any] | str


@dataclass(frozen=True)
class Spelling:
    """One way to write a canonical operation, with the arguments that it is called with."""

    op: str
    signature: Signature

    def bind(self, node: fx.Node) -> dict[str, Any] | None:
        """Return the node's arguments by name, including those that only other spellings have, or None if the call does
        not fit the signature."""
        names = self.signature.names
        if len(node.args) > len(names) or not all(name in names for name in node.kwargs):
            return None
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        bound = {**_OPS[self.op].called.defaults, **self.signature.defaults, **given}
        missing = any(name not in given for name in self.signature.required())
        return None if missing else bound


@dataclass
class CanonicalOp:
    """An operation as patterns see it.

    Attributes:
        name: its name in patterns.
        arguments: the arguments that patterns see, with their defaults.
        called: all arguments that calls of it have.
        fresh: every call makes a new tensor and does nothing else, unless it is in place.
        ignores_autocast: the result is the same whether autocast is on or off.
        read: what a call means, where that depends on its arguments.
        instead: what patterns see instead, if they never see this operation.
        is_open: further spellings may add arguments.
    """

    name: str
    arguments: Signature
    called: Signature
    fresh: bool = False
    ignores_autocast: bool = False
    read: Reader | None = None
    instead: str | None = None
    is_open: bool = False

    def term(self, terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
        """Return what a call means, or None if no pattern may see it."""
        if self.read is not None:
            return self.read(terms, node, given)
        seen = {name: given[name] for name in self.arguments.names}
        hidden = given.keys() - seen.keys()
        return Term(self.name, seen) if all(given[name] == self.called.defaults[name] for name in hidden) else None


_OPS: dict[str, CanonicalOp] = {}
_SPELLED: dict[str, dict[Any, Spelling]] = {"function": {}, "method": {}, "operator": {}}


@dataclass(frozen=True)
class Call:
    """Targets with the arguments that they are called with."""

    signature: Signature
    targets: tuple[Target, ...]


def call(arguments: str, *targets: Target) -> Call:
    """For `canonical`: spellings that take other arguments than patterns see."""
    return Call(parse(arguments), targets)


def canonical(
    name: str,
    arguments: str,
    *spellings: Target | Call,
    fresh: bool = False,
    ignores_autocast: bool = False,
    read: Reader | None = None,
    instead: str | None = None,
) -> None:
    """Declare a canonical operation; see `CanonicalOp`.

    `arguments` lists what patterns see, in order; `name=value` gives a default, a literal or a bare word. Spellings are
    called with these arguments, unless they are in a `call`.
    """
    seen = parse(arguments)
    plain = tuple(each for each in spellings if not isinstance(each, Call))
    calls = [each for each in spellings if isinstance(each, Call)]
    calls += [Call(seen, plain)] if plain else []
    called = merge([each.signature for each in calls] or [seen])
    _OPS[name] = CanonicalOp(name, seen, called, fresh, ignores_autocast, read, instead)
    for each in calls:
        _spell(name, each)


def spell(op: str, signature: str, *spellings: Target) -> None:
    """Add spellings of a canonical operation, which may be a new one.

    The signature lists the arguments of the spellings; `name=value` gives a default, a literal or a bare word. A
    pattern that does not mention an argument matches calls that leave it at its default; one without a default must
    be mentioned.

    Raises:
        RuleError: if the signature or a spelling cannot be right, with the line that it is written in.
    """
    try:
        if not spellings:
            raise ValueError("name a function, a method or an operator that is spelled so")
        parsed = parse(signature)
        known = _OPS.get(op)
        if known is not None and not known.is_open:
            _check_arguments(known, parsed)
        for target in spellings:
            _table_of(op, target)
        if known is None or known.is_open:
            merged = merge([*_other_signatures(op, spellings), parsed])
            _OPS[op] = CanonicalOp(op, merged, merged, is_open=True)
    except ValueError as problem:
        raise RuleError(f"{written_at()}: spell({op!r}, {signature!r}): {problem}") from None
    _spell(op, Call(parsed, spellings))


def _check_arguments(op: CanonicalOp, spelled: Signature) -> None:
    """A declared operation has the arguments that it is declared with: others would be dropped."""
    for name in spelled.names:
        if name not in op.called.names:
            raise ValueError(f"{op.name!r} has no argument {name!r}, but {op.called}; spell it by another name")
    for name in op.called.required():
        if name not in spelled.names:
            raise ValueError(f"{op.name!r} needs the argument {name!r}; spell it by another name")


def _spell(op: str, made: Call) -> None:
    for target in made.targets:
        _table_of(op, target)[target] = Spelling(op, made.signature)


def _table_of(op: str, target: Any) -> dict[Any, Spelling]:
    """The table that a spelling belongs in.

    Raises:
        ValueError: if it is no spelling, or one of another operation.
    """
    kind = "function"
    if isinstance(target, str):
        kind = "operator" if "." in target else "method"
    elif not callable(target):
        raise ValueError(f"{target!r} is neither a callable nor the name of a method or an operator")
    known = _SPELLED[kind].get(target)
    if known is not None and known.op != op:
        raise ValueError(f"{target!r} is spelled {known.op!r} already, and patterns see it as that")
    return _SPELLED[kind]


def _other_signatures(op: str, targets: tuple[Any, ...]) -> list[Signature]:
    known = ((target, spelling) for table in _SPELLED.values() for target, spelling in table.items())
    return [spelling.signature for target, spelling in known if spelling.op == op and target not in targets]


def spelling_of(node: fx.Node) -> Spelling | None:
    """Return the spelling of a call node, or None if its target is not the spelling of any operation."""
    if node.op == "call_function":
        try:
            found = _SPELLED["function"].get(node.target)
        except TypeError:  # an unhashable callable
            return None
        if found is None and isinstance(node.target, (OpOverload, OpOverloadPacket)):
            return _SPELLED["operator"].get(str(node.target).removesuffix(".default"))
        return found
    return _SPELLED["method"].get(str(node.target)) if node.op == "call_method" else None


def operation(name: str) -> CanonicalOp:
    """Return the declaration of a canonical operation."""
    return _OPS[name]


def operations() -> set[str]:
    """Return the canonical operations that patterns see, including those spelled since fastlora was imported."""
    return {name for name, op in _OPS.items() if op.instead is None}


def signature_of(op: str) -> Signature | None:
    """Return the arguments that patterns see of an operation, or None if they see no such operation."""
    found = _OPS.get(op)
    return None if found is None or found.instead is not None else found.arguments


def seen_instead(op: str) -> str | None:
    """Return what patterns see instead of an operation that they never see."""
    found = _OPS.get(op)
    return None if found is None else found.instead
