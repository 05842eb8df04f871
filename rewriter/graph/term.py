"""What a node means: a canonical operation on nodes and constants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import fx


@dataclass(frozen=True)
class Term:
    """A canonical operation on nodes and constants."""

    op: str
    args: dict[str, Any]


class Terms(Protocol):
    """What a reader may ask about the nodes before its own."""

    def producer(self, value: Any) -> Any:
        """Return the node that produced a value, seen through identities; constants stand for themselves."""

    def term(self, value: Any) -> Term | None:
        """Return the meaning of the node that produced a value, or None if it is not known."""


Reader = Callable[[Terms, fx.Node, dict[str, Any]], "Term | None"]
"""What a call means, given its arguments by name; None if patterns are not to see it."""


def identity(value: Any) -> Term:
    """The term of a node that only hands on a value."""
    return Term("identity", {"input": value})
