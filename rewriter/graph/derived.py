"""Values that a graph does not hold: an operation on values that it holds.

A reader returns a term with one where a call means two operations: `x @ W` is a linear layer whose weight is the
transpose of `W`, and `torch.add(x, y, alpha=2)` is the sum of `x` and `2 * y`. A rule may compute one as an argument of
its op. Only those that become arguments are inserted into the graph, when the match is committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
from torch import fx

from fastlora.graph.term import Term


class DerivedValue:
    """The value of `function(*args)`, of nodes, derived values and constants.

    Args:
        function: an operation without effects, whose result does not depend on autocast.
        args: its arguments.
        term: what patterns see; None for a value that only becomes an argument.
        example: the fake tensor of the value, if tracing recorded one; otherwise the function computes it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        term: Term | None = None,
        example: torch.Tensor | None = None,
    ) -> None:
        self.function, self.args, self.term, self._recorded = function, args, term, example

    def __eq__(self, other: object) -> bool:
        """Whether two are the same operation on the same values."""
        return isinstance(other, DerivedValue) and (self.function, self.args) == (other.function, other.args)

    def __hash__(self) -> int:
        return hash((self.function, self.args))

    def __repr__(self) -> str:
        return f"{self.function.__name__} of {', '.join(map(str, self.args))}"

    @property
    def may_be_argument(self) -> bool:
        """Whether a pattern may capture the value as an argument of its op. A transpose costs nothing there."""
        return self.function is torch.t

    @cached_property
    def example(self) -> torch.Tensor:
        """The fake tensor that tracing would have recorded."""
        if self._recorded is not None:
            return self._recorded
        first = next(self.nodes()).meta["example_value"]
        with first.fake_mode, torch.no_grad(), torch.autocast(first.device.type, enabled=False):
            value: torch.Tensor = self.evaluate(lambda node: node.meta["example_value"])
        requires_grad = any(node.meta["example_value"].requires_grad for node in self.nodes())
        return value.requires_grad_(requires_grad and (value.is_floating_point() or value.is_complex()))

    def nodes(self) -> Iterator[fx.Node]:
        """Yield the nodes that the value is computed from."""
        for arg in self.args:
            if isinstance(arg, DerivedValue):
                yield from arg.nodes()
            elif isinstance(arg, fx.Node):
                yield arg

    def evaluate(self, value_of: Callable[[fx.Node], Any]) -> Any:
        """Return the value, given those of the nodes."""
        return self.function(*(self._argument(arg, value_of) for arg in self.args))

    @staticmethod
    def _argument(arg: Any, value_of: Callable[[fx.Node], Any]) -> Any:
        if isinstance(arg, DerivedValue):
            return arg.evaluate(value_of)
        return value_of(arg) if isinstance(arg, fx.Node) else arg

    def insert(self, graph: fx.Graph, node_of: Callable[[fx.Node], fx.Node]) -> fx.Node:
        """Insert nodes that compute the value, at the graph's insertion point; `node_of` maps nodes that it reads."""
        args = [arg.insert(graph, node_of) if isinstance(arg, DerivedValue) else arg for arg in self.args]
        given = tuple(node_of(arg) if isinstance(arg, fx.Node) else arg for arg in args)
        node = graph.call_function(self.function, given)
        node.meta["example_value"] = self.example
        return node


def transposed(matrix: Any) -> Any:
    """Return the transpose of a matrix (rows, cols), or the matrix that a derived transpose was made of."""
    if isinstance(matrix, DerivedValue) and matrix.function is torch.t:
        return matrix.args[0]
    return DerivedValue(torch.t, (matrix,), Term("transposed", {"input": matrix}))


def nodes_in(value: Any) -> list[fx.Node]:
    """Return the nodes that an argument of an op consists of, or is derived from."""
    if isinstance(value, (list, tuple)):
        return [node for item in value for node in nodes_in(item)]
    if isinstance(value, DerivedValue):
        return list(value.nodes())
    return [value] if isinstance(value, fx.Node) else []
