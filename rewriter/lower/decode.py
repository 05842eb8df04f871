"""Passing quantized weights to ops as they are stored, so that the graph does not compute the dequantized weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from fastlora.kernels.core.arguments import with_member
from fastlora.kernels.core.library import REGISTERED
from fastlora.kernels.core.semantic_op import DerivedArgument
from fastlora.kernels.ops import dequantize_4bit
from fastlora.lower.rematerialize import DerivedNode


def quantized_arguments(graph: fx.Graph) -> Iterator[DerivedNode]:
    """Yield the weights that ops of a graph can read quantized, and set the ops' arguments for them to None."""
    for node in graph.nodes:
        op = REGISTERED.get(node.target)
        for name in op.policy.reads_quantized if op is not None else ():
            assert op is not None
            position = op.names.index(name)
            weight: Any = node.args[position]
            members: Any = enumerate(weight) if isinstance(weight, (list, tuple)) else [(None, weight)]
            for member, value in list(members):
                if isinstance(value, fx.Node) and value.target is dequantize_4bit.target:
                    node.update_arg(position, with_member(node.args[position], member, None))
                    yield DerivedNode(node, DerivedArgument(name, member, dequantize_4bit, quantized=True), value.args)
