"""Rematerialization: outputs of norms that only one op reads are recomputed in the backward instead of being saved.

A norm saves its input for its own backward; an op that reads the output, such as a linear layer, would save that as
well. Recomputing it takes microseconds, and saves the memory of one activation for each norm.
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
    """A node of an op, one of its arguments that another op computes, and the arguments of that op."""

    node: fx.Node
    argument: DerivedArgument
    values: tuple[Any, ...]


def recomputable_arguments(graph: fx.Graph) -> Iterator[DerivedNode]:
    """Yield the arguments, at most one for each op, that can be recomputed from what their source op saves."""
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
    """Return whether a call of an op saves anything, which it does if one of its inputs requires a gradient."""
    leaves: Any = op.leaves.flat(node.args)
    return any(t is not None and t.requires_grad for t in map(meta, leaves))


def _source(value: fx.Node) -> tuple[SemanticOp, tuple[Any, ...]] | None:
    """Return the op and the arguments that recompute a node's value, if it is the first output of an op that can be
    recomputed, else None."""
    if value.target is not operator.getitem or value.args[1] != 0:
        return None
    producer: Any = value.args[0]
    op = REGISTERED.get(producer.target)
    found = op.recompute_source() if op is not None else None
    if op is None or found is None or not _saves(op, producer):
        return None
    values = dict(zip(op.names, producer.args, strict=True))
    values |= {op.result_names[user.args[1]]: user for user in producer.users if user.target is operator.getitem}
    source, names = found
    return (source, tuple(values[name] for name in names)) if all(name in values for name in names) else None
