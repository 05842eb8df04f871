"""Quantized weights that ops read as they are stored, so that the dequantized weight is no value of the graph."""

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
    """Find the weights that ops of a graph can read quantized; take them out of the ops' arguments."""
    for node in graph.nodes:
        op = REGISTERED.get(node.target)
        for name in op.policy.reads_quantized if op is not None else ():
            assert op is not None
            at = op.names.index(name)
            given: Any = node.args[at]
            members: Any = enumerate(given) if isinstance(given, (list, tuple)) else [(None, given)]
            for member, value in list(members):
                if isinstance(value, fx.Node) and value.target is dequantize_4bit.target:
                    node.update_arg(at, with_member(node.args[at], member, None))
                    yield DerivedNode(node, DerivedArgument(name, member, dequantize_4bit, quantized=True), value.args)
