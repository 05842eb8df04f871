"""Replacing the chosen matches in the graph."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from fastlora.graph.derived import DerivedValue
from fastlora.graph.view import View
from fastlora.match.rule import Match
from fastlora.match.seeded_dropout import Seed

_SOURCE_META = ("nn_module_stack", "stack_trace", "source_fn_stack")


def commit(gm: fx.GraphModule, view: View, matches: Sequence[Match]) -> None:
    """Replace disjoint, legal matches by their ops, then remove the nodes that have no users left."""
    replaced: dict[fx.Node, fx.Node] = {}
    for match in sorted(matches, key=lambda m: view.order[m.root]):
        _replace(gm.graph, view, match, replaced)
    _erase(gm.graph, view, matches)
    gm.graph.lint()
    gm.recompile()


def _replace(graph: fx.Graph, view: View, match: Match, replaced: dict[fx.Node, fx.Node]) -> None:
    """Insert the op of a match, and let the users of its outputs read the op's. `replaced` has the new node for each
    output that was replaced so far."""
    insertion_point = match.insertion_point()

    def value(argument: Any) -> Any:
        if isinstance(argument, Seed):
            return _draw(graph, view, argument, insertion_point)
        if isinstance(argument, DerivedValue):
            with graph.inserting_before(insertion_point):
                return argument.insert(graph, lambda node: replaced.get(node, node))
        return replaced.get(argument, argument) if isinstance(argument, fx.Node) else argument

    inserted = insertion_point.prev
    values = fx.node.map_aggregate(match.op.order(match.arguments), value)
    with graph.inserting_before(insertion_point):
        call = graph.call_function(match.op.target, tuple(values))  # type: ignore[arg-type]
        results = _unpack(graph, call, match)
        if match.rule.result is not None:
            for output, example in zip(results, match.op_outputs, strict=True):
                output.meta["example_value"] = example
            arguments = dict(zip(match.op.names, values, strict=False))
            results = match.rule.result.insert(graph, results, arguments.__getitem__)
    while (inserted := inserted.next) is not insertion_point:
        view.order[inserted] = view.order[insertion_point] - 0.5
        inserted.meta.update({key: match.root.meta[key] for key in _SOURCE_META if key in match.root.meta})
    for old, new in zip(match.outputs, results, strict=True):
        new.meta["example_value"] = old.meta["example_value"]
        old.replace_all_uses_with(new)
        replaced[old] = new


def _draw(graph: fx.Graph, view: View, seed: Seed, insertion_point: fx.Node) -> fx.Node:
    """Insert a node that draws the seed before the dropout or before the op, whichever is earlier."""
    before = min(seed.dropout, insertion_point, key=view.order.__getitem__)
    with graph.inserting_before(before):
        node = seed.draw(graph)
    view.order[node] = view.order[before] - 0.5
    node.meta.update({key: seed.dropout.meta[key] for key in _SOURCE_META if key in seed.dropout.meta})
    return node


def _unpack(graph: fx.Graph, call: fx.Node, match: Match) -> list[fx.Node]:
    """Return a node for each output. An op with several outputs and residuals returns them as a tuple."""
    op = match.op

    def item(source: fx.Node, index: int) -> fx.Node:
        return graph.call_function(operator.getitem, (source, index))

    is_tensor = len(op.outputs) + len(op.residuals) == 1
    results: list[Any] = [call] if is_tensor else [item(call, i) for i in range(len(op.outputs))]
    if op.outputs[0].is_list:
        return [item(results[0], i) for i in range(len(match.outputs))]
    return results


def _erase(graph: fx.Graph, view: View, matches: Sequence[Match]) -> None:
    """Erase the replaced nodes, and identities that only these read. Dead-code elimination would also erase in-place
    operations, which have no users."""
    replaced = {node for match in matches for node in match.inside()}
    for node in reversed(list(graph.nodes)):
        if node in replaced and not node.users:
            replaced.update(filter(view.is_identity, node.all_input_nodes))
            graph.erase_node(node)
