"""The state of matching a pattern, and the trace of failed attempts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import fx

from fastlora.graph.view import View

Predicate = Callable[[View, Any], "bool | str"]
"""Takes the view and a value; returns True if the value may be captured, or a sentence that says why not."""


class State(NamedTuple):
    """One partial match. It is a tuple because matching makes about a hundred of them for each node.

    Attributes:
        values: captured and named values by name, where named values have a dot before the name.
        members: the nodes that the match would replace.
        shared: those members that stay in the graph if other nodes use them.
        seen: the value that each pattern has matched, by the pattern's id.
        tags: the alternative that each `either` took, by name or id.
    """

    values: Mapping[str, Any] = MappingProxyType({})
    members: tuple[fx.Node, ...] = ()
    shared: tuple[fx.Node, ...] = ()
    seen: Mapping[int, Any] = MappingProxyType({})
    tags: Mapping[str, str] = MappingProxyType({})

    def including(self, node: Any) -> State:
        """Return the state with a member more, if the value is a node of the graph."""
        if not isinstance(node, fx.Node):
            return self
        return State(self.values, (*self.members, node), self.shared, self.seen, self.tags)

    def bind(self, name: str, value: Any) -> State:
        return State({**self.values, name: value}, self.members, self.shared, self.seen, self.tags)


@dataclass
class Trace:
    """Collects why branches failed; the deepest failure explains a near miss best."""

    notes: list[tuple[tuple[fx.Node, ...], str]] = field(default_factory=list)

    def note(self, state: State, reason: str) -> None:
        self.notes.append((state.members, reason))


def describe(value: Any, op: str | None = None) -> str:
    """Return the name of a value for reports."""
    if not isinstance(value, fx.Node):
        return repr(value)
    if op is None:
        op = "a graph input" if value.op == "placeholder" else getattr(value.target, "__name__", str(value.target))
    return f"{op} ({value.name})"


def same_value(left: Any, right: Any) -> bool:
    """Return whether two values are the same node or derived value, or equal constants."""
    return left is right if isinstance(left, fx.Node) or isinstance(right, fx.Node) else bool(left == right)
