"""Matches: the subgraphs that rules claim, and the values in them by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fastlora.errors import RuleError, suggestion
from fastlora.graph.derived import nodes_in
from fastlora.graph.fake_values import meta
from fastlora.graph.view import View
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.match.definition import Definition
from fastlora.match.state import State


@dataclass(eq=False)
class Match:
    """A subgraph that a rule matches: the nodes that it replaces, the op's arguments, and the captured values."""

    rule: Definition
    view: View
    outputs: tuple[fx.Node, ...]
    members: tuple[fx.Node, ...]
    shared: tuple[fx.Node, ...]
    arguments: dict[str, Any]
    state: State = field(default_factory=State)
    parts: tuple[Match, ...] = ()
    op_outputs: list[torch.Tensor] = field(default_factory=list)
    """The op's outputs as fake tensors, set by the legality check."""

    @property
    def op(self) -> SemanticOp:
        return self.rule.op

    @property
    def root(self) -> fx.Node:
        return self.outputs[0]

    def inside(self) -> set[fx.Node]:
        """Return the nodes that the match covers: its members, and the identities of all members but the outputs."""
        inner = (self.view.value_class(member) for member in self.members if member not in self.outputs)
        return {*self.members, *(same for nodes in inner for same in nodes)}

    def argument_nodes(self) -> list[fx.Node]:
        """Return the nodes that the replacement will read."""
        return nodes_in(list(self.arguments.values()))

    def outside_users(self) -> list[fx.Node]:
        """Return the nodes that will read the replacement's outputs."""
        inside = self.inside() - set(self.shared)
        return [user for output in self.outputs for user in output.users if user not in inside]

    def insertion_point(self) -> fx.Node:
        """Return the node before which to insert the replacement: the one after the last output, or an earlier user."""
        order = self.view.order
        last = max(self.outputs, key=order.__getitem__)
        return min([last.next, *self.outside_users()], key=order.__getitem__)

    def tag(self, name: str) -> str | None:
        """Return the alternative that the `either` of this name took, or None if the match does not include it."""
        if name not in self.rule.tags:
            raise self._rule_error(f"no either is named {name!r}; {suggestion(name, self.rule.tags)}")
        return self.state.tags.get(name)

    def value(self, name: str | None = None) -> Any:
        """Return a captured or named value, or None if the match does not include it; without a name, the root."""
        if name is None:
            return self.root
        if name not in self.rule.names:
            raise self._rule_error(f"nothing is captured or named {name!r}; {suggestion(name, self.rule.names)}")
        return self.state.values.get(name, self.state.values.get(f".{name}"))

    def tensor(self, name: str | None = None) -> torch.Tensor:
        """Return the fake tensor of a captured or named value."""
        tensor = meta(self.value(name))
        if tensor is None:
            raise self._rule_error(f"{name!r} is not a tensor in this match")
        return tensor

    def slice_of(self, name: str) -> dict[str, Any]:
        """Return the bounds (`start`, `stop`, `step`) of a named slice."""
        term = self.view.term(self.value(name))
        if term is None or term.op != "slice":
            raise self._rule_error(f"{name!r} is not a slice in this match")
        return term.args

    def dtype(self, name: str | None = None) -> torch.dtype:
        return self.tensor(name).dtype

    def _rule_error(self, text: str) -> RuleError:
        return RuleError(f"{self.rule.source}: rule {self.rule.name}: {text}")


@dataclass(frozen=True)
class DtypeOf:
    """An attribute of a rule that is the dtype of a value; made by `dtype_of`."""

    name: str | None
    default: torch.dtype | None

    def __call__(self, match: Match) -> torch.dtype:
        if self.default is not None and self.name is not None and match.value(self.name) is None:
            return self.default
        return match.dtype(self.name)


@dataclass(frozen=True)
class TagOf:
    """An attribute of a rule that is the alternative of an `either`; made by `tag_of`."""

    name: str

    def __call__(self, match: Match) -> str | None:
        return match.tag(self.name)


def dtype_of(name: str | None = None, default: torch.dtype | None = None) -> DtypeOf:
    """Make an attribute that is the dtype of a named value, or of the root without a name.

    It is `default` if the match does not include the value. For `attrs`.
    """
    return DtypeOf(name, default)


def tag_of(name: str) -> TagOf:
    """Make an attribute that is the alternative which the `either` of this name took. For `attrs`."""
    return TagOf(name)
