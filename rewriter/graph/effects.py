"""The effects of a graph: in-place writes, shared memory, and the modes that are active at each node.

Effects are probed: unless a node is known to return a new tensor, it runs once on fake tensors, and version counters
and storages show what it wrote to and what it aliases. So `operator.iadd`, `setitem`, `relu_`, `out=` and views need no
table.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastlora.compat import tracing
from fastlora.compat.autograd import storage_id
from fastlora.compat.dispatch import HigherOrderOperator, OpOverload, schema_of, tree_leaves
from fastlora.compat.tracing import FakeTensorMode, ShapeEnv, is_of_functorch
from fastlora.graph.canonical_ops import operation, spelling_of
from fastlora.graph.fake_values import hint, meta

Mode = tuple[bool, tuple[fx.Node, ...], tuple[fx.Node, ...], tuple[fx.Node, ...]]
"""Whether gradients are enabled, and the nodes that enter the autocast, inference-mode and torch.func regions around a
node."""

Probe = tuple[list[int], list[int]]
"""The positions of the input nodes that a node writes to, and of those that its result may alias."""

BODIES = ("tag_activation_checkpoint", "wrap")
"""Higher-order ops whose bodies are ordinary code."""

_PURE = ("autograd_function_apply", "flex_attention")
_REGIONS = (
    tracing.set_grad_enabled,
    tracing.enter_autocast,
    tracing.exit_autocast,
    tracing.enter_inference_mode,
    tracing.exit_inference_mode,
    tracing.disable_saved_tensors_hooks,
    tracing.enable_saved_tensors_hooks,
)
"""Functions that enter and exit modes. They take and return no tensors, but exiting autocast clears its weight cache,
so they must not be probed."""


def modes(graph: fx.Graph) -> dict[fx.Node, Mode]:
    """Return the modes that are active at each node."""
    grad = torch.is_grad_enabled()
    autocast: tuple[fx.Node, ...] = ()
    inference: tuple[fx.Node, ...] = ()
    transforms: tuple[fx.Node, ...] = ()
    found: dict[fx.Node, Mode] = {}
    for node in graph.nodes:
        found[node] = (grad, autocast, inference, transforms)
        target = node.target
        if target is tracing.set_grad_enabled:
            grad = bool(node.args[0])
        elif target is tracing.enter_autocast:
            autocast = (*autocast, node)
        elif target is tracing.exit_autocast:
            autocast = tuple(region for region in autocast if region is not node.args[0])
        elif target is tracing.enter_inference_mode:
            inference = (*inference, node)
        elif target is tracing.exit_inference_mode:
            inference = tuple(region for region in inference if region is not node.args[0])
        elif is_of_functorch(node):
            name = str(getattr(target, "__name__", ""))
            if name.endswith("_increment_nesting"):
                transforms = (*transforms, node)
            elif name.endswith("_decrement_nesting"):
                transforms = transforms[:-1]
    return found


class Mutations:
    """The in-place writes of a graph, and the values that may share memory.

    Args:
        graph: the graph to analyze.
        always: whether to analyze shared memory even if nothing is written.
    """

    def __init__(self, graph: fx.Graph, always: bool = False) -> None:
        self._alias: dict[fx.Node, fx.Node] = {}
        self._writes: dict[fx.Node, list[fx.Node]] = {}
        probes = {node: _probe(node) for node in graph.nodes if node.op.startswith("call") and not is_fresh(node)}
        if not always and not any(written for written, _ in probes.values()):
            return
        for node, (_, aliased) in probes.items():
            for position in aliased:
                self._join(node, node.all_input_nodes[position])
        self._join_inputs(graph)
        for node, probe in probes.items():
            for position in probe[0]:
                self._writes.setdefault(self.storage(node.all_input_nodes[position]), []).append(node)

    def storage(self, node: fx.Node) -> fx.Node:
        """Return the node that represents all nodes which may share memory with `node`."""
        while node in self._alias:
            node = self._alias[node]
        return node

    def writers(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that may write in place to the memory of `node`."""
        return self._writes.get(self.storage(node), []) if self._writes else []

    def sharing(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes whose values may share memory with that of `node`, itself included."""
        memory = self.storage(node)
        return [other for other in dict.fromkeys((node, memory, *self._alias)) if self.storage(other) is memory]

    def _join(self, left: fx.Node, right: fx.Node) -> None:
        if self.storage(left) is not self.storage(right):
            self._alias[self.storage(left)] = self.storage(right)

    def _join_inputs(self, graph: fx.Graph) -> None:
        """Join inputs that were views of one tensor when they were traced."""
        first_of: dict[int, fx.Node] = {}
        for node in graph.nodes:
            if node.op == "placeholder" and (tensor := meta(node)) is not None:
                self._join(node, first_of.setdefault(storage_id(tensor), node))


def is_fresh(node: fx.Node) -> bool:
    """Return whether a node is known to return a new tensor and to have no effects."""
    if isinstance(node.target, OpOverload):
        schema = schema_of(node.target)
        return not schema.is_mutable and all(result.alias_info is None for result in schema.returns)
    spelling = spelling_of(node)
    bound = spelling.bind(node) if spelling is not None else None
    if spelling is None or bound is None or spelling.writes or bound.get("inplace"):
        return False
    return operation(spelling.op).fresh


_PROBED: dict[Any, Probe] = {}


def _probe(node: fx.Node) -> Probe:
    inputs = node.all_input_nodes
    if isinstance(node.target, HigherOrderOperator):
        return _probe_higher_order(node, inputs)
    if is_of_functorch(node) or node.target in _REGIONS:  # running it would change the modes of the process
        return [], list(range(len(inputs)))
    examples = [source.meta.get("example_value") for source in inputs]
    signature = tuple(str((e.dtype, e.dim())) if isinstance(e, torch.Tensor) else str(type(e)) for e in examples)
    key = (node.target, str(fx.node.map_arg((node.args, node.kwargs), lambda _: "node")), signature)
    if key not in _PROBED:
        _PROBED[key] = _run_probe(node, inputs)
    return _PROBED[key]


def _probe_higher_order(node: fx.Node, inputs: list[fx.Node]) -> Probe:
    """Analyze the body of a higher-order op that runs it as ordinary code; assume of most others that they write to
    everything."""
    everything = list(range(len(inputs)))
    name = node.target.name()  # type: ignore[union-attr]
    if name in _PURE:
        return [], _aliased_by_function(node, inputs) if name == "autograd_function_apply" else everything
    body = getattr(node.graph.owning_module, str(inputs[0].target), None) if name in BODIES else None
    if not isinstance(body, fx.GraphModule):
        return everything, everything
    inner = Mutations(body.graph)
    placeholders = [n for n in body.graph.nodes if n.op == "placeholder"]
    operands = [arg for arg in node.args if isinstance(arg, fx.Node) and arg is not inputs[0]]
    written = {operand for operand, p in zip(operands, placeholders, strict=False) if inner.writers(p)}
    return [position for position, source in enumerate(inputs) if source in written], everything


def _aliased_by_function(node: fx.Node, inputs: list[fx.Node]) -> list[int]:
    """Return the positions of the inputs that the results of an autograd function may alias, by its forward."""
    forward = getattr(node.graph.owning_module, str(inputs[0].target), None)
    if not isinstance(forward, fx.GraphModule):
        return list(range(len(inputs)))
    inner = Mutations(forward.graph, always=True)
    returned: Any = next(iter(reversed(forward.graph.nodes))).args[0]
    placeholders = [n for n in forward.graph.nodes if n.op == "placeholder"]
    if not isinstance(returned, (tuple, list)) or len(placeholders) != len(node.args) - 2:
        return list(range(len(inputs)))
    results = returned[0]  # the second item is what it saves
    storages = {inner.storage(each) for each in tree_leaves(results) if isinstance(each, fx.Node)}
    operands = zip(node.args[2:], placeholders, strict=True)
    aliased = {operand for operand, placeholder in operands if inner.storage(placeholder) in storages}
    return [position for position, source in enumerate(inputs) if source in aliased]


def _run_probe(node: fx.Node, inputs: list[fx.Node]) -> Probe:
    everything = list(range(len(inputs)))
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), torch.no_grad():
        fresh = {source: _fresh(source.meta.get("example_value")) for source in inputs}
        before = {source: [t._version for t in _tensors(value)] for source, value in fresh.items()}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), fresh.__getitem__)
        try:
            if node.op == "call_method":
                result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                result = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # assume that it writes to all its inputs
            return everything, everything
    results = {storage_id(tensor) for tensor in _tensors(result)}
    written = [i for i, source in enumerate(inputs) if [t._version for t in _tensors(fresh[source])] != before[source]]
    aliased = [i for i, s in enumerate(inputs) if any(storage_id(t) in results for t in _tensors(fresh[s]))]
    return written, aliased


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _fresh(example: Any) -> Any:
    """Return a new fake tensor like the traced one, with hints for symbolic sizes."""
    if isinstance(example, torch.Tensor):
        return torch.empty([hint(size) for size in example.shape], dtype=example.dtype, device=example.device)
    if isinstance(example, (list, tuple)):
        items = [_fresh(item) for item in example]
        return type(example)(*items) if hasattr(example, "_fields") else type(example)(items)
    return hint(example)
