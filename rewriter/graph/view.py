"""A read-only canonical view of an FX graph: the term of each node, and which nodes have the same value.

Rules match the view instead of the nodes, so the graph does not have to be normalized, and what no rule matches stays
bit-identical. The view resolves spellings, recognizes casts by their effect, skips nodes that only pass on a value,
reads several ways of writing an operation as one, and records the semantic ops that rules have raised.

Dtypes and shapes come from metadata (`meta["example_value"]`), never from arguments: under autocast the two differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fastlora.graph import readers
from fastlora.graph.canonical_ops import operation, spelling_of
from fastlora.graph.derived import DerivedValue
from fastlora.graph.effects import Mutations, modes
from fastlora.graph.fake_values import meta
from fastlora.graph.overwrites import replaces_its_input
from fastlora.graph.term import Term


@dataclass
class View:
    """The canonical view of one graph. The bodies of higher-order ops have separate views.

    Attributes:
        graph: the graph.
        order: the position of each node.
        raised: the matches of rules, by the node that each would replace.
    """

    graph: fx.Graph
    order: dict[fx.Node, float] = field(init=False)
    raised: dict[fx.Node, list[Any]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.order = {node: position for position, node in enumerate(self.graph.nodes)}
        self._producers: dict[fx.Node, fx.Node] = {}
        self._classes: dict[fx.Node, list[fx.Node]] = {}
        self._terms: dict[fx.Node, Term | None] = {}
        self.mutations = Mutations(self.graph)
        self.modes = modes(self.graph)
        self.functional_writes: set[fx.Node] = set()  # those that are read as operations that write to nothing
        for node in self.graph.nodes:
            term = self._read(node)
            if term is not None and term.op in ("identity", "cast") and self._stops_gradients(node, term.args["input"]):
                term = None
            if term is not None and term.op == "identity" and self._is_written(node, term.args["input"]):
                term = None
            if term is not None and term.op == "identity":
                producer = self.producer(term.args["input"])
                self._producers[node] = producer
                self._classes.setdefault(producer, [producer]).append(node)
            else:
                self._terms[node] = term

    def _stops_gradients(self, node: fx.Node, source: Any) -> bool:
        """Return whether a node detaches its input, which makes it another value."""
        before, after = meta(source), meta(node)
        if before is None or after is None:
            return False
        return before.requires_grad != after.requires_grad or (before.requires_grad and not self.modes[node][0])

    def _is_written(self, node: fx.Node, source: Any) -> bool:
        """Return whether a node or its source is written in place: they may differ when they are read."""
        return bool(self.writers(node) or self.writers(source))

    def writers(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that may write in place to the memory of `node`, after it is computed and until one of
        `functional_writes` replaces its value.
        """
        found = self.mutations.writers(node)
        replacing = [self.order[writer] for writer in found if writer in self.functional_writes]
        computed = max((at for at in replacing if at <= self.order[node]), default=float("-inf"))
        replaced = min((at for at in replacing if at > self.order[node]), default=float("inf"))
        return [writer for writer in found if computed < self.order[writer] <= replaced]

    # -- value classes -------------------------------------------------------------------------------------------------

    def producer(self, value: Any) -> Any:
        """Return the node that computes a value, skipping identities; constants are returned unchanged."""
        return self._producers.get(value, value) if isinstance(value, fx.Node) else value

    def is_identity(self, node: fx.Node) -> bool:
        """Return whether a node only passes on the value of another."""
        return node in self._producers

    def value_class(self, node: fx.Node) -> list[fx.Node]:
        """Return all nodes with the value of `node`: its producer, and the identities of the producer."""
        producer = self.producer(node)
        return self._classes.get(producer, [producer])

    def users(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that use a value, without identities of it."""
        same = self.value_class(node)
        return [user for member in same for user in member.users if self._producers.get(user) is not same[0]]

    def term(self, value: Any) -> Term | None:
        """Return the term of the node that computes a value, or None if it has none."""
        if isinstance(value, DerivedValue):
            return value.term
        return self._terms.get(self._producers.get(value, value)) if isinstance(value, fx.Node) else None

    def producers(self) -> list[fx.Node]:
        """Return every node that is not an identity, in graph order."""
        return list(self._terms)

    # -- reading a node ------------------------------------------------------------------------------------------------

    def _read(self, node: fx.Node) -> Term | None:
        if node.op == "call_method" and node.target in readers.CASTS:
            return readers.cast(node)
        if node.op == "call_method" and node.target in readers.RESHAPES:
            return readers.reshape(self, node)
        spelling = spelling_of(node)
        args = spelling.bind(node) if spelling is not None else None
        if spelling is None or args is None:
            return None
        writes = spelling.writes or args.get("inplace") is True
        op = operation(spelling.op)
        if writes and not replaces_its_input(node, args[op.arguments.names[0]], self.order, self.mutations):
            return None
        term = op.term(self, node, args | {"inplace": False} if "inplace" in args else args)
        if writes and term is not None:
            if term.op == "identity":
                return None
            self.functional_writes.add(node)
        return term
