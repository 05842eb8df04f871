"""Terms: canonical operations on nodes and constants, as patterns see nodes."""

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
    """The terms of earlier nodes, which readers look up."""

    def producer(self, value: Any) -> Any:
        """Return the node that computes a value, skipping identities; constants are returned unchanged."""

    def term(self, value: Any) -> Term | None:
        """Return the term of the node that computes a value, or None if it has none."""


Reader = Callable[[Terms, fx.Node, dict[str, Any]], "Term | None"]
"""Takes earlier terms, a call and its arguments by name; returns its term, or None if patterns must not see it."""


def is_graph_input(terms: Terms, value: Any) -> bool:
    """Return whether a value is an input of the graph, such as a parameter or buffer, possibly through identities."""
    producer = terms.producer(value)
    return isinstance(producer, fx.Node) and producer.op in ("placeholder", "get_attr")


def identity(value: Any) -> Term:
    """Return the term of a node that only passes on a value."""
    return Term("identity", {"input": value})
