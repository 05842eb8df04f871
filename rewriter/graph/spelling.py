"""Declaring canonical operations and their spellings, and looking up the spelling of a node.

The declarations are in `fastlora.graph.canonical_ops`; import from there, so that they exist.
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
    """One way to write a canonical operation, the signature of its calls, and whether they write in place, to the first
    argument."""

    op: str
    signature: Signature
    writes: bool = False

    def bind(self, node: fx.Node) -> dict[str, Any] | None:
        """Return the node's arguments by name, with defaults, including those of arguments that only other spellings
        have; None if the call does not fit the signature."""
        names = self.signature.names
        if len(node.args) > len(names) or not all(name in names for name in node.kwargs):
            return None
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        bound = {**_OPS[self.op].called.defaults, **self.signature.defaults, **given}
        missing = any(name not in given for name in self.signature.required())
        return None if missing else bound


@dataclass
class CanonicalOp:
    """An operation that patterns can match.

    Attributes:
        name: its name in patterns.
        arguments: the arguments that patterns see, with their defaults.
        called: all arguments of its spellings.
        fresh: whether every call returns a new tensor and has no effects, unless it is in place.
        ignores_autocast: whether autocast does not change the result.
        read: returns the term of a call, if that depends on its arguments.
        instead: what patterns see instead, if they never see this operation.
        is_open: whether further spellings may add arguments.
    """

    name: str
    arguments: Signature
    called: Signature
    fresh: bool = False
    ignores_autocast: bool = False
    read: Reader | None = None
    instead: str | None = None
    is_open: bool = False

    def term(self, terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
        """Return the term of a call, or None if patterns must not see it."""
        if self.read is not None:
            return self.read(terms, node, args)
        seen = {name: args[name] for name in self.arguments.names}
        hidden = args.keys() - seen.keys()
        return Term(self.name, seen) if all(args[name] == self.called.defaults[name] for name in hidden) else None


_OPS: dict[str, CanonicalOp] = {}
_SPELLINGS: dict[str, dict[Any, Spelling]] = {"function": {}, "method": {}, "operator": {}}


@dataclass(frozen=True)
class Call:
    """Targets that share a signature."""

    signature: Signature
    targets: tuple[Target, ...]


def call(arguments: str, *targets: Target) -> Call:
    """Return spellings whose arguments differ from those that patterns see, as an argument of `canonical`."""
    return Call(parse(arguments), targets)


def canonical(
    name: str,
    arguments: str,
    *spellings: Target | Call,
    fresh: bool = False,
    ignores_autocast: bool = False,
    read: Reader | None = None,
    instead: str | None = None,
    inplace: tuple[Target, ...] = (),
) -> None:
    """Declare a canonical operation; see `CanonicalOp`.

    `arguments` lists the arguments that patterns see, in order; `name=value` gives a default, a literal or a bare word.
    Spellings have the same arguments, unless they are in a `call`. Those in `inplace` have the arguments of all others
    together, and write the result over the first; patterns see them where nothing reads the old value afterwards.
    """
    seen = parse(arguments)
    plain = tuple(each for each in spellings if not isinstance(each, Call))
    calls = [each for each in spellings if isinstance(each, Call)]
    calls += [Call(seen, plain)] if plain else []
    called = merge([each.signature for each in calls] or [seen])
    _OPS[name] = CanonicalOp(name, seen, called, fresh, ignores_autocast, read, instead)
    for each in calls:
        _spell(name, each)
    _spell(name, Call(called, inplace), writes=True)


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
            raise ValueError("pass at least one spelling: a function, or the name of a method or an operator")
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
    """Raise `ValueError` if a spelling of a declared operation lacks or adds arguments, which would be dropped."""
    for name in spelled.names:
        if name not in op.called.names:
            raise ValueError(f"{op.name!r} has no argument {name!r}, but {op.called}; spell it by another name")
    for name in op.called.required():
        if name not in spelled.names:
            raise ValueError(f"{op.name!r} needs the argument {name!r}; spell it by another name")


def _spell(op: str, calls: Call, writes: bool = False) -> None:
    for target in calls.targets:
        _table_of(op, target)[target] = Spelling(op, calls.signature, writes)


def _table_of(op: str, target: Any) -> dict[Any, Spelling]:
    """Return the table of `_SPELLINGS` that a target belongs in.

    Raises:
        ValueError: if it cannot be a spelling, or is one of another operation.
    """
    kind = "function"
    if isinstance(target, str):
        kind = "operator" if "." in target else "method"
    elif not callable(target):
        raise ValueError(f"{target!r} is neither a callable nor the name of a method or an operator")
    known = _SPELLINGS[kind].get(target)
    if known is not None and known.op != op:
        raise ValueError(f"{target!r} is already a spelling of {known.op!r}")
    return _SPELLINGS[kind]


def _other_signatures(op: str, targets: tuple[Any, ...]) -> list[Signature]:
    known = ((target, spelling) for table in _SPELLINGS.values() for target, spelling in table.items())
    return [spelling.signature for target, spelling in known if spelling.op == op and target not in targets]


def spelling_of(node: fx.Node) -> Spelling | None:
    """Return the spelling of a call node, or None if its target is not the spelling of any operation."""
    if node.op == "call_function":
        try:
            found = _SPELLINGS["function"].get(node.target)
        except TypeError:  # an unhashable callable
            return None
        if found is None and isinstance(node.target, (OpOverload, OpOverloadPacket)):
            return _SPELLINGS["operator"].get(str(node.target).removesuffix(".default"))
        return found
    return _SPELLINGS["method"].get(str(node.target)) if node.op == "call_method" else None


def operation(name: str) -> CanonicalOp:
    """Return the declaration of a canonical operation."""
    return _OPS[name]


def operations() -> set[str]:
    """Return the canonical operations that patterns see, including those that `spell` has added."""
    return {name for name, op in _OPS.items() if op.instead is None}


def signature_of(op: str) -> Signature | None:
    """Return the signature of an operation in patterns, or None if patterns see no such operation."""
    found = _OPS.get(op)
    return None if found is None or found.instead is not None else found.arguments


def seen_instead(op: str) -> str | None:
    """Return what patterns see instead of an operation, or None if they see the operation itself."""
    found = _OPS.get(op)
    return None if found is None else found.instead
