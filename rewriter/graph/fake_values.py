"""Reading the metadata that tracing recorded for nodes, without adding guards."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastlora.compat.dynamo import is_static_input
from fastlora.compat.tracing import statically_known_true
from fastlora.graph.derived import DerivedValue


def meta(value: Any) -> torch.Tensor | None:
    """Return the fake tensor that tracing recorded for a node, or None if its value is not a tensor."""
    if isinstance(value, DerivedValue):
        return value.example
    example = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    return example if isinstance(example, torch.Tensor) else None


def hint(size: Any) -> Any:
    """Return the number that a symbolic number had when it was traced, or 8 for a data-dependent size."""
    if not isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return size
    return size.node.hint if size.node.hint is not None else 8


def known_equal(left: Any, right: Any) -> bool:
    """Return whether two sizes are equal for every input of the graph; never adds a guard."""
    return bool(statically_known_true(left == right))


def known_less(left: Any, right: Any) -> bool:
    """Return whether a size is smaller than another for every input of the graph; never adds a guard."""
    return bool(statically_known_true(left < right))


def same_shape(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two shapes are equal for every input of the graph; never adds a guard."""
    return left.dim() == right.dim() and all(map(known_equal, left.shape, right.shape))


def static_input_indices(gm: fx.GraphModule) -> frozenset[int]:
    """Return the positions of the graph's inputs that are attributes of modules, not arguments of the call: parameters,
    buffers, and the tensors of quantized weights."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    return frozenset(i for i, node in enumerate(inputs) if is_static_input(node))
