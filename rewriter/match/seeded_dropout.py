"""Dropouts that an op computes itself: the graph draws the seed of the mask where the model drew the mask.

The pattern `seeded` includes a dropout in the match and captures a `Seed`, an argument that is not yet in the graph. It
becomes a node when the match is committed,

    seed = torch.randint(2 ** 63 - 1, (1,), device=...)        in place of        z = dropout(x, p)

from PyTorch's generator of the device, so `torch.manual_seed`, the random state that a checkpoint restores, and CUDA
graphs work as for a dropout. The random numbers differ from eager's.

Only here may a random node be replaced. When a match is verified, both sides use the mask of one fixed seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from fastlora.graph.fake_values import meta
from fastlora.graph.view import View
from fastlora.kernels.formulas.dropout import SEEDS, reference
from fastlora.match.combinators import Kept
from fastlora.match.pattern import Op, Pattern
from fastlora.match.state import Predicate, State, Trace, describe


@dataclass(frozen=True, repr=False)
class Seed:
    """The seed of the mask that a dropout would have drawn."""

    dropout: fx.Node
    p: float

    def __repr__(self) -> str:
        return "a seed"  # the same for all seeds, as the key of a verified match must not depend on the node

    def example(self) -> torch.Tensor:
        """Return the example value that tracing would have recorded."""
        return _like(self.dropout).new_empty((1,), dtype=torch.int64)

    def fixed(self, device: torch.device) -> torch.Tensor:
        """Return the fixed seed of replays."""
        return torch.zeros(1, dtype=torch.int64, device=device)

    def replay(self, x: torch.Tensor) -> torch.Tensor:
        """Return the dropout of x with the mask of the fixed seed."""
        return reference(x, None, self.fixed(x.device), self.p, x.dtype)

    def draw(self, graph: fx.Graph) -> fx.Node:
        """Insert a node that draws the seed, at the graph's insertion point."""
        example = self.example()
        node = graph.call_function(torch.randint, (SEEDS, (1,)), {"device": example.device})
        node.meta["example_value"] = example
        return node


def _like(node: fx.Node) -> torch.Tensor:
    tensor = meta(node)
    assert tensor is not None, f"{node.name} is a dropout, and holds no tensor"
    return tensor


def seeds(arguments: dict[str, Any]) -> list[Seed]:
    """Return the seeds among a match's arguments, including those in lists."""
    leaves = [v for value in arguments.values() for v in (value if isinstance(value, list) else [value])]
    return [leaf for leaf in leaves if isinstance(leaf, Seed)]


def _count_uses(view: View, node: fx.Node) -> int:
    """Return how many arguments of other nodes a value is; one user may read it twice."""
    arguments: list[fx.Node] = []
    for user in dict.fromkeys(view.users(node)):
        fx.node.map_arg((user.args, user.kwargs), lambda argument: arguments.append(view.producer(argument)))
    return arguments.count(node)


class Seeded(Kept):
    """A dropout of `x` that the match replaces; captures the seed as `name`, and matches the probability with `p`."""

    def __init__(self, name: str, x: Pattern, p: Pattern, where: Predicate) -> None:
        super().__init__(name, Op("dropout", input=x, p=p))
        self.where = where

    def _branches(self, view: View, value: Any, state: State, trace: Trace | None) -> Iterator[State]:
        for found in self.shape.match(view, value, state, trace):
            refusal = self._refusal(view, value)
            if refusal is None:
                node, term = view.producer(value), view.term(value)
                assert term is not None
                yield found.bind(self.name, Seed(node, term.args["p"]))
            elif trace is not None:
                trace.note(state, refusal)

    def _refusal(self, view: View, value: Any) -> str | None:
        """Return why the dropout must stay in the graph, or None."""
        term = view.term(value)
        p = term.args["p"] if term is not None else None
        if not isinstance(p, float) or not 0 < p < 1:
            return f"{describe(value)} has the probability {p}, which is not between 0 and 1"
        if _count_uses(view, view.producer(value)) != 1:
            return f"{describe(value)} has other uses"
        verdict = self.where(view, value)
        if verdict is True:
            return None
        return verdict if isinstance(verdict, str) else f"{describe(value)} may not be drawn again"
