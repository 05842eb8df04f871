"""What a graph does besides computing values: mutation, randomness, and the modes that hold at each node.

Effects are probed, not looked up: an unknown node runs once on fresh fake tensors, and a bumped version counter or a
shared storage tells what it did. `operator.iadd`, `setitem`, `relu_` and `out=` need no table that way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._pytree import tree_leaves

from fastlora.spelling import spelling_of
from fastlora.view import CASTS, RESHAPES, View, meta

Mode = tuple[bool, tuple[fx.Node, ...], tuple[fx.Node, ...]]
"""Whether gradients are on, and the autocast and inference-mode regions around a node, by the nodes that enter them."""

Probe = tuple[list[fx.Node], list[fx.Node]]
"""The inputs that a node writes to, and those whose memory its result shares."""

_ALIASING = {"slice", "reshape", "transposed", "chunk", "split", "getitem", "cast", "flatten", "transpose"}


def modes(graph: fx.Graph) -> dict[fx.Node, Mode]:
    """The modes in force at each node."""
    grad = torch.is_grad_enabled()
    autocast: tuple[fx.Node, ...] = ()
    inference: tuple[fx.Node, ...] = ()
    found: dict[fx.Node, Mode] = {}
    for node in graph.nodes:
        target = node.target
        if target is torch._C._set_grad_enabled:
            grad = bool(node.args[0])
        elif target is torch.amp.autocast_mode._enter_autocast:
            autocast = (*autocast, node)
        elif target is torch.amp.autocast_mode._exit_autocast:
            autocast = tuple(region for region in autocast if region is not node.args[0])
        elif target is torch.autograd.grad_mode._enter_inference_mode:
            inference = (*inference, node)
        elif target is torch.autograd.grad_mode._exit_inference_mode:
            inference = tuple(region for region in inference if region is not node.args[0])
        found[node] = (grad, autocast, inference)
    return found


class Mutations:
    """Where tensors are written in place, and which values share memory with them."""

    def __init__(self, view: View) -> None:
        self._view = view
        self._alias: dict[fx.Node, fx.Node] = {}
        self._writes: dict[fx.Node, list[fx.Node]] = {}
        probes = {node: _probe(node) for node in view.graph.nodes if _may_write(node)}
        writers = {node: probe[0] for node, probe in probes.items() if probe[0]}
        if not writers:
            return
        for node in view.graph.nodes:
            for source in self._shares_memory(node, probes):
                self._alias[self.storage(node)] = self.storage(source)
        for node, written in writers.items():
            for tensor in written:
                self._writes.setdefault(self.storage(tensor), []).append(node)

    def storage(self, node: fx.Node) -> fx.Node:
        """A representative of everything that may share memory with `node`."""
        while node in self._alias and self._alias[node] is not node:
            node = self._alias[node]
        return node

    def writers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that write, in place, to memory which `node` may share."""
        return self._writes.get(self.storage(node), []) if self._writes else []

    def _shares_memory(self, node: fx.Node, probes: dict[fx.Node, Probe]) -> list[fx.Node]:
        if node in probes:
            return probes[node][1]
        producer, term = self._view.producer(node), self._view.term(node)
        if producer is not node:
            return [node.all_input_nodes[0]]
        return node.all_input_nodes[:1] if term is not None and term.op in _ALIASING else []


def _may_write(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method") or isinstance(node.target, torch._ops.HigherOrderOperator):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    spelling = spelling_of(node)
    bound = spelling.bind(node) if spelling is not None else None
    return (bound is None or bool(bound.get("inplace"))) and str(node.target) not in CASTS | RESHAPES


_PROBED: dict[Any, tuple[list[int], list[int]]] = {}


def _probe(node: fx.Node) -> Probe:
    inputs = node.all_input_nodes
    signature = tuple((str(t.dtype), t.dim()) if (t := meta(n)) is not None else None for n in inputs)
    key = (node.target, str(fx.node.map_arg((node.args, node.kwargs), lambda _: "node")), signature)
    if key not in _PROBED:
        _PROBED[key] = _run_probe(node, inputs)
    written, shared = _PROBED[key]
    return [inputs[i] for i in written], [inputs[i] for i in shared]


def _run_probe(node: fx.Node, inputs: list[fx.Node]) -> tuple[list[int], list[int]]:
    everything = list(range(len(inputs)))
    with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True), torch.no_grad():
        fresh = {source: _fresh(source.meta.get("example_value")) for source in inputs}
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), fresh.__getitem__)
        before = {source: tensor._version for source, tensor in fresh.items() if isinstance(tensor, torch.Tensor)}
        try:
            if node.op == "call_method":
                result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                result = node.target(*args, **kwargs)  # type: ignore[operator]
        except Exception:  # what cannot be run cannot be trusted: assume that it writes to all it is given
            return everything, everything
    written = [i for i, source in enumerate(inputs) if source in before and fresh[source]._version != before[source]]
    results = {leaf.untyped_storage()._cdata for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
    shared = [i for i, s in enumerate(inputs) if s in before and fresh[s].untyped_storage()._cdata in results]
    return written, shared


def _fresh(example: Any) -> Any:
    """A new fake tensor like the recorded one, with symbolic sizes replaced by their hints."""
    if isinstance(example, torch.Tensor):
        return torch.empty([hint(size) for size in example.shape], dtype=example.dtype, device=example.device)
    if isinstance(example, (list, tuple)):
        return type(example)(_fresh(item) for item in example)
    return hint(example)


def hint(size: Any) -> Any:
    """The number that tracing saw for a symbolic one."""
    return size.node.hint if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size
