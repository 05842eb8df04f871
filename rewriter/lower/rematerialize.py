"""Values that are made again in the backward instead of being kept: the outputs of norms that one op alone reads.

A norm keeps what it normed for its own backward; an op that reads the result, such as the layers behind it, would keep
that as well. One more pass over what is there anyway takes microseconds, and saves an activation for each norm.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import fx

from fastlora.kernels.core.semantic_op import Make, SemanticOp


class Again(NamedTuple):
    """A node of an op that reads an argument, what makes that one for it, and that one's arguments."""

    node: fx.Node
    make: Make
    values: tuple[Any, ...]


def found(graph: fx.Graph, ops: dict[Any, SemanticOp]) -> Iterator[Again]:
    """Where that is possible in a rewritten graph; `ops` has the ops by the targets of their nodes."""
    for node in graph.nodes:
        op = ops.get(node.target)
        if op is None or op.foresees:
            continue
        saved = {a.name for a in op.saved if not a.is_list}
        for name, value in zip(op.names, node.args, strict=True):
            if name in saved and isinstance(value, fx.Node) and list(value.users) == [node]:
                made = _maker(value, ops)
                if made is not None and node.args.count(value) == 1:
                    yield Again(node, Make(name, None, made[0]), made[1])
                    break


def _maker(value: fx.Node, ops: dict[Any, SemanticOp]) -> tuple[SemanticOp, tuple[Any, ...]] | None:
    """What makes a node's value again, if it is the first output of an op that knows."""
    if value.target is not operator.getitem or value.args[1] != 0:
        return None
    source: Any = value.args[0]
    op = ops.get(source.target)
    again = op.makes_again() if op is not None else None
    if op is None or again is None:
        return None
    known = dict(zip(op.names, source.args, strict=True))
    known |= {op.result_names[user.args[1]]: user for user in source.users if user.target is operator.getitem}
    maker, names = again
    return (maker, tuple(known[name] for name in names)) if all(name in known for name in names) else None
