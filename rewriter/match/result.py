"""The right-hand side of a rule: an expression around its op, for example for a pattern that computes `-op(...)`.

    @rule(ops.linear_cross_entropy, result=lambda loss, labels: -loss.view_as(labels), ...)

The function takes the op's outputs, then arguments of the op by their names, and returns what replaces the outputs of
the pattern. It is recorded once, where the rule is defined, and may only negate, add, subtract, multiply, divide,
slice, cast and reshape: such calls have no effects, do not depend on autocast, and are differentiated by autograd.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from fastlora.graph.canonical_ops import spelling_of
from fastlora.graph.readers import CASTS, RESHAPES
from fastlora.kernels.core.semantic_op import SemanticOp

_ARITHMETIC = ("neg", "add", "sub", "mul", "div")


class Result:
    """An expression over an op's outputs and some of its arguments.

    Attributes:
        function: the function that computes the expression.
        arguments: the names of the op's arguments that it reads.
        recorded: the expression as a graph, with the outputs and arguments as placeholders.
        count: the number of values that it returns.
    """

    def __init__(self, function: Callable[..., Any], op: SemanticOp) -> None:
        self.function = function
        names = list(inspect.signature(function).parameters)
        self._outputs = len(op.outputs)
        self.arguments = tuple(names[self._outputs :])
        self._optional = [a.name for a in op.arguments if a.is_optional and a.name in self.arguments]
        self.recorded = fx.Graph()
        returned = self.function(*(fx.Proxy(self.recorded.placeholder(name)) for name in names))
        values = returned if isinstance(returned, tuple) else (returned,)
        self.count = len(values)
        self.recorded.output(tuple(value.node if isinstance(value, fx.Proxy) else value for value in values))

    def __call__(self, outputs: Sequence[torch.Tensor], argument: Callable[[str], Any]) -> list[torch.Tensor]:
        """Compute the expression of tensors; `argument` returns the value of an op's argument by its name."""
        values = dict(zip(self.recorded.nodes, [*outputs, *map(argument, self.arguments)], strict=False))
        for node in self.recorded.nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "output":
                return list(args[0])
            if node.op == "call_method":
                values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
            elif node.op == "call_function":
                values[node] = node.target(*args, **kwargs)
        raise AssertionError("a recorded expression has an output")

    def insert(self, graph: fx.Graph, outputs: Sequence[fx.Node], argument: Callable[[str], Any]) -> list[fx.Node]:
        """Insert the expression into a graph, at its insertion point, with example values on all nodes."""
        inputs = iter([*outputs, *map(argument, self.arguments)])
        inserted: dict[fx.Node, fx.Node] = {}
        for node in self.recorded.nodes:
            if node.op == "placeholder":
                inserted[node] = next(inputs)
            elif node.op != "output":
                inserted[node] = new = graph.node_copy(node, inserted.__getitem__)
                new.meta["example_value"] = _example_value(new)
        (returned,) = (node.args[0] for node in self.recorded.nodes if node.op == "output")
        return [inserted[node] for node in returned]  # type: ignore[union-attr,index]

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the recorded calls."""
        for name in self._optional:
            yield f"result= reads {name!r}, which may be None: write a separate rule for that case"
        computed: set[Any] = set()
        for position, node in enumerate(self.recorded.nodes):
            if position < self._outputs or not computed.isdisjoint(node.all_input_nodes):
                computed.add(node)
            if node.op.startswith("call") and not _is_supported(node):
                called = getattr(node.target, "__name__", node.target)
                yield f"result= calls {called}: only negation, arithmetic, slices, casts and reshapes are possible"
            if node.op == "output" and not computed.issuperset(node.args[0]):
                yield "result= must return values that are computed from the op's outputs"


def _is_supported(node: fx.Node) -> bool:
    if node.op == "call_method" and node.target in CASTS | RESHAPES:
        dtypes = [value for value in (*node.args, *node.kwargs.values()) if isinstance(value, torch.dtype)]
        return all(dtype.is_floating_point for dtype in dtypes)  # integers have no gradient
    spelling = spelling_of(node)
    if spelling is None or spelling.writes or spelling.bind(node) is None:
        return False
    if spelling.op == "getitem":
        parts = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        return all(part is Ellipsis or isinstance(part, slice) for part in parts)
    return spelling.op in _ARITHMETIC


def _example_value(node: fx.Node) -> Any:
    """Return the example value that tracing would have recorded for a new node."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: source.meta["example_value"])
    with node.all_input_nodes[0].meta["example_value"].fake_mode:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]
