"""Values that are recomputed in the backward instead of being saved: outputs of norms that one op alone reads.

A norm saves what it normalized for its own backward; an op that reads the result, such as the layers behind it, would
save that as well. Recomputing it takes microseconds, and saves an activation for each norm.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import fx

from fastlora.graph.fake_values import meta
from fastlora.kernels.core.library import REGISTERED
from fastlora.kernels.core.semantic_op import DerivedArgument, SemanticOp


class DerivedNode(NamedTuple):
    """A node of an op, an argument of it that another op makes, and that op's arguments."""

    node: fx.Node
    argument: DerivedArgument
    values: tuple[Any, ...]


def recomputable_arguments(graph: fx.Graph) -> Iterator[DerivedNode]:
    """Find the arguments, at most one an op, whose source keeps all that it takes to make them again."""
    for node in graph.nodes:
        op = REGISTERED.get(node.target)
        if op is None or op.policy.grads_in_forward:
            continue
        saved = {a.name for a in op.saved if not a.is_list}
        for name, value in zip(op.names, node.args, strict=True):
            if name in saved and isinstance(value, fx.Node) and list(value.users) == [node]:
                source = _source(value)
                if source is not None and node.args.count(value) == 1:
                    yield DerivedNode(node, DerivedArgument(name, None, source[0]), source[1])
                    break


def _saves(op: SemanticOp, node: fx.Node) -> bool:
    """Whether a call of an op saves anything: where nothing that it reads has a gradient, it does not."""
    leaves: Any = op.leaves.flat(node.args)
    return any(t is not None and t.requires_grad for t in map(meta, leaves))


def _source(value: fx.Node) -> tuple[SemanticOp, tuple[Any, ...]] | None:
    """Return what recomputes a node's value, if that is the first output of an op that can be recomputed."""
    if value.target is not operator.getitem or value.args[1] != 0:
        return None
    producer: Any = value.args[0]
    op = REGISTERED.get(producer.target)
    found = op.recompute_source() if op is not None else None
    if op is None or found is None or not _saves(op, producer):
        return None
    known = dict(zip(op.names, producer.args, strict=True))
    known |= {op.result_names[user.args[1]]: user for user in producer.users if user.target is operator.getitem}
    source, names = found
    return (source, tuple(known[name] for name in names)) if all(name in known for name in names) else None
