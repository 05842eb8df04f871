"""What a captured value must be: the annotations of a rule's parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from fastlora.graph.derived import nodes_in
from fastlora.graph.fake_values import meta
from fastlora.graph.term import is_graph_input
from fastlora.graph.view import View
from fastlora.kernels.ops import dequantize_4bit
from fastlora.match.state import Predicate, describe


@dataclass(frozen=True)
class Param:
    """A graph input with `dim` dimensions, such as a parameter or buffer, the transpose of one, or a 4-bit weight
    dequantized from inputs."""

    dim: int

    def __call__(self, view: View, value: Any) -> bool | str:
        producer, tensor = view.producer(value), meta(value)
        if tensor is None or not all(_is_input(view, node) for node in nodes_in(producer)):
            return f"{describe(value)} is not a parameter"
        return tensor.dim() == self.dim or f"{describe(producer)} has {tensor.dim()} dimensions, not {self.dim}"


def _is_input(view: View, node: fx.Node) -> bool:
    term = view.term(node)
    if term is not None and term.op == "transposed":
        node = view.producer(term.args["input"])
    return is_graph_input(view, node) or node.target is dequantize_4bit.target


def Scalar(view: View, value: Any) -> bool | str:
    """Accept numbers: literals, and symbolic numbers of the graph."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return True
    symbolic = isinstance(value, fx.Node) and not isinstance(value.meta.get("example_value"), (type(None), tuple, list))
    return (symbolic and meta(value) is None) or f"{describe(value)} is not a number"


def Constant(view: View, value: Any) -> bool | str:
    """Accept constants, such as the name of a reduction."""
    return not isinstance(value, fx.Node) or f"{describe(value)} is not a constant"


class Opt:
    """An optional capture: `Opt` alone for any tensor or None, `Opt[Param(1)]` with a predicate."""

    def __init__(self, predicate: Predicate | None = None) -> None:
        self.predicate = predicate

    def __class_getitem__(cls, predicate: Predicate) -> Opt:
        return cls(predicate)
