"""Signatures of operations, written as `"input other alpha=1"`: names, some of them with defaults."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Signature:
    """The names of arguments in order, and the defaults of those that have one."""

    names: tuple[str, ...]
    defaults: dict[str, Any]

    def __str__(self) -> str:
        return " ".join(f"{n}={self.defaults[n]!r}" if n in self.defaults else n for n in self.names)

    def required(self) -> list[str]:
        return [name for name in self.names if name not in self.defaults]


def parse(text: str) -> Signature:
    """Parse a signature: names, and `name=value` for a default, a Python literal without spaces or a bare word.

    Raises:
        ValueError: if it is malformed.
    """
    names: list[str] = []
    defaults: dict[str, Any] = {}
    for item in text.split():
        name, equals, value = item.partition("=")
        if not name.isidentifier() or (equals and not value):
            raise ValueError(f"{item!r} is not an argument: write name or name=value, without spaces around the =")
        if name in names:
            raise ValueError(f"{name!r} is listed twice")
        names.append(name)
        if equals:
            defaults[name] = _literal(value)
    return Signature(tuple(names), defaults)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):  # a bare word
        return text


def merge(signatures: Sequence[Signature]) -> Signature:
    """Return the signature of an operation from those of its spellings.

    An argument that some spellings lack has the default that the others give it. An argument of all spellings, with
    different defaults, has no default.

    Raises:
        ValueError: for an argument that some spellings lack, and that has no single default in the others.
    """
    names = tuple(dict.fromkeys(name for each in signatures for name in each.names))
    defaults = {}
    for name in names:
        with_name = [each for each in signatures if name in each.names]
        values = [each.defaults[name] for each in with_name if name in each.defaults]
        if len(values) == len(with_name) and all(value == values[0] for value in values):
            defaults[name] = values[0]
        elif len(with_name) < len(signatures):
            raise ValueError(
                f"not all spellings of the operation have {name!r}, so those that do need one default for it"
            )
    return Signature(names, defaults)
