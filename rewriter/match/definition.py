"""The declarations of rules, which their checks and matches read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx

from fastlora.graph.view import View
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.match.pattern import Pattern
from fastlora.match.result import Result

Anchor = str | Callable[[View, fx.Node], bool]
"""The name of an operation, or a predicate on a view and a node, that marks a candidate for fusion."""


@dataclass(eq=False, kw_only=True, repr=False)
class Definition:
    """A named rewrite to one op.

    Attributes:
        name, source: the name of the decorated function, and its `file:line`.
        op: the op that a match becomes.
        benefit: preference among overlapping matches.
        result: the expression around the op that a match becomes, if it is not the op itself.
        names: the names of captured and named values.
        tags: the names of `either` patterns.
    """

    name: str
    source: str
    op: SemanticOp
    benefit: int
    result: Result | None = None
    names: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"{self.name} ({self.source})"


@dataclass(eq=False, kw_only=True, repr=False)
class PatternDefinition(Definition):
    """A rewrite whose subgraph is described by a pattern.

    Attributes:
        outputs: the patterns of the op's outputs; all but the first are parts of the first.
        variables: the values of captured arguments that a match does not include.
        anchor: marks the candidates, which the report explains if no rule matches them.
        attrs: arguments that are computed from the match.
        fuses: whether the pattern matches ops that other rules have raised.
    """

    outputs: tuple[Pattern, ...]
    variables: dict[str, Any]
    anchor: Anchor | None
    attrs: dict[str, Any]
    fuses: bool
