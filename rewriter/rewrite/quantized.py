"""Base layers with 4-bit weights, as bitsandbytes traces them, read as linear layers of decoded weights.

TorchDynamo records such a product as the operator `bitsandbytes::gemm_4bit`, or, where its input wants a gradient, as
an autograd function whose forward is that operator, and whose backward decodes the weight and multiplies by it. Before
rules look at a graph, `propose` puts in its place the two nodes that it means,

    W = dequantize_4bit(packed, absmax, ...)        y = linear(x, W, b)

and after matches are chosen, `settle` restores those that no op took, so that they run as they were traced. Ops that
take one read the 4-bit weight itself, and W is never a value of the graph.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fastlora.compat.dispatch import OpOverload
from fastlora.graph.fake_values import meta
from fastlora.kernels.ops import dequantize_4bit

_GEMM = ("A", "B", "shapeB", "absmax", "blocksize", "quant_type")
_OPTIONAL = ("bias", "absmax_8bit", "absmax_code", "absmax_offset")
_NESTED_BLOCKSIZE = 256
"""Of the scales of scales; the operator knows no other."""
_BACKWARD = ("dequantize_4bit", "dequantize_blockwise", "iadd", "to", "matmul", "sum", "_set_grad_enabled", "view")
"""What the backward of a product is made of."""


@dataclass(frozen=True)
class Proposal:
    """The linear layer that stands for a product as long as rules look, and the call that was traced for that: what it
    read as input and bias, which may be others by the time it is put back."""

    linear: fx.Node
    call: fx.node.Target
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]
    x: fx.Node
    bias: fx.Node | None

    def restore(self, graph: fx.Graph, alive: set[fx.Node]) -> None:
        """Put the call in the place of the linear layer."""
        now = {self.bias: self.linear.args[2]}
        if self.x not in alive or _uncast(self.x) is not self.linear.args[0]:  # which is another by now
            now[self.x] = self.linear.args[0]
        args, kwargs = fx.node.map_arg((self.args, self.kwargs), lambda node: now.get(node, node))
        with graph.inserting_before(self.linear):
            result = call = graph.create_node("call_function", self.call, args, kwargs)
            if _is_function(call):
                result = graph.call_function(operator.getitem, (call, 0))
        call.meta, result.meta = self.meta, dict(self.linear.meta)
        self.linear.replace_all_uses_with(result)
        graph.erase_node(self.linear)


def propose(gm: fx.GraphModule) -> list[Proposal]:
    """Replace each product of a 4-bit weight by what it means."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    read = [(node, given) for node in gm.graph.nodes if (given := _product(gm, node)) is not None]
    return [_propose(gm.graph, node, given, order) for node, given in read]


def settle(graph: fx.Graph, proposals: list[Proposal]) -> None:
    """Restore the products whose linear layers are still there, and remove what only the others read."""
    alive = set(graph.nodes)
    for proposal in proposals:
        if proposal.linear in alive:
            proposal.restore(graph, alive)
    read: set[fx.Node] = set()
    for proposal in proposals:
        fx.node.map_arg((proposal.args, proposal.kwargs), read.add)
    for node in reversed(list(graph.nodes)):
        if node in read and not node.users and _is_left_over(node):
            read.update(node.all_input_nodes)
            graph.erase_node(node)
    erase_unused(graph)


def erase_unused(graph: fx.Graph) -> None:
    """Remove decoded weights without users, and move the others before their first user."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in order:
        if node.target is dequantize_4bit.target:
            if node.users:
                min(node.users, key=order.__getitem__).prepend(node)
            else:
                graph.erase_node(node)


def _is_left_over(node: fx.Node) -> bool:
    """Whether a node without users was there for a product alone."""
    return node.op == "get_attr" or _is_view(node) or _uncast(node) is not node


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "view"


def _propose(graph: fx.Graph, node: fx.Node, given: dict[str, Any], order: dict[fx.Node, int]) -> Proposal:
    rows, cols = given["shapeB"]
    example = meta(node)
    assert example is not None
    nested = given["absmax_8bit"] is not None
    values = dequantize_4bit.order({
        "packed": _source(given["B"]),
        "absmax": given["absmax_8bit"] if nested else given["absmax"],
        "nested_absmax": given["absmax"] if nested else None,
        "nested_code": given["absmax_code"],
        "offset": given["absmax_offset"],
        "blocksize": given["blocksize"],
        "nested_blocksize": _NESTED_BLOCKSIZE,
        "quant_type": given["quant_type"],
        "rows": rows,
        "cols": cols,
        "dtype": example.dtype,
    })  # fmt: skip
    with graph.inserting_after(max((v for v in values if isinstance(v, fx.Node)), key=order.__getitem__)):
        weight = graph.call_function(dequantize_4bit.target, tuple(values))
    with example.fake_mode:  # type: ignore[attr-defined]
        weight.meta["example_value"] = torch.empty(rows, cols, dtype=example.dtype, device=example.device)
    with graph.inserting_after(node):
        linear = graph.call_function(F.linear, (_uncast(given["A"]), weight, given["bias"]))
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear)
    call: Any = node.args[0] if node.target is operator.getitem else node
    made = Proposal(linear, call.target, call.args, call.kwargs, dict(call.meta), given["A"], given["bias"])
    for each in dict.fromkeys((node, call)):
        graph.erase_node(each)
    return made


def _product(gm: fx.GraphModule, node: fx.Node) -> dict[str, Any] | None:
    """The arguments of the operator, if a node's value is its product with what the graph is given."""
    given = _gemm(node)
    if given is None and node.target is operator.getitem and node.args[1] == 0 and _is_function(node.args[0]):
        given = _of_function(gm, node.args[0])  # type: ignore[arg-type]
    if given is None:
        return None
    result, x = meta(node), meta(given["A"])
    if result is None or x is None or result.dtype != x.dtype:
        return None
    parts = [_source(given[name]) for name in ("B", "absmax", *_OPTIONAL[1:]) if given[name] is not None]
    if not all(isinstance(part, fx.Node) and part.op in ("placeholder", "get_attr") for part in parts):
        return None
    return given


def _source(packed: Any) -> Any:
    """What a packed weight is a view of: only its bytes, in their order, matter."""
    while isinstance(packed, fx.Node) and _is_view(packed):
        packed = packed.args[0]
    return packed


def _uncast(x: fx.Node) -> fx.Node:
    """What a change of dtype was made of that changes nothing, and stands between a norm and its reader."""
    while x.op == "call_method" and x.target == "to" and isinstance(source := x.args[0], fx.Node):
        before, after = meta(source), meta(x)
        if before is None or after is None or (before.dtype, before.device) != (after.dtype, after.device):
            break
        x = source
    return x


def _gemm(node: fx.Node) -> dict[str, Any] | None:
    if not _names(node, "bitsandbytes.gemm_4bit.default"):
        return None
    given = dict.fromkeys(_OPTIONAL) | dict(zip((*_GEMM, *_OPTIONAL), node.args, strict=False)) | node.kwargs
    return given if all(name in given for name in _GEMM) else None


def _names(node: fx.Node, name: str) -> bool:
    """Whether a node calls the operator of that name, in a library that need not be installed."""
    return isinstance(node.target, OpOverload) and str(node.target) == name


def _is_function(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is torch.ops.higher_order.autograd_function_apply


def _of_function(gm: fx.GraphModule, call: fx.Node) -> dict[str, Any] | None:
    """The same of an autograd function, in the values that it is called with, if it is known to be the product."""
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in call.users):
        return None
    forward, backward = (getattr(gm, str(source.target), None) for source in call.args[:2])  # type: ignore[union-attr]
    if not isinstance(forward, fx.GraphModule) or not isinstance(backward, fx.GraphModule):
        return None
    found = [given for node in forward.graph.nodes if (given := _gemm(node)) is not None]
    inner = [n for n in forward.graph.nodes if n.op == "placeholder"]
    if len(found) != 1 or len(inner) != len(call.args) - 2 or not _decodes(backward, found[0]):
        return None
    outer = dict(zip(inner, call.args[2:], strict=True))
    given = {name: _source(value) for name, value in found[0].items()}
    if not all(value in outer for value in given.values() if isinstance(value, fx.Node)):
        return None
    results = next(iter(reversed(forward.graph.nodes))).args[0]
    first: Any = results[0][0] if isinstance(results[0], (tuple, list)) else results[0]
    if not isinstance(first, fx.Node) or _gemm(first) is None:
        return None
    _thaw(backward)
    return {name: outer[value] if isinstance(value, fx.Node) else value for name, value in given.items()}


def _thaw(backward: fx.GraphModule) -> None:
    """Let a backward cast the weight to the dtype of the incoming gradient, and not to the one that tracing saw: under
    autocast they may differ."""
    product = next(node for node in backward.graph.nodes if _short(node) == "matmul")
    incoming, weight = product.args
    with backward.graph.inserting_before(product):
        dtype = backward.graph.call_function(getattr, (incoming, "dtype"))
        cast = backward.graph.call_method("to", (weight, dtype))
    product.args = (incoming, cast)
    backward.recompile()


def _decodes(backward: fx.GraphModule, given: dict[str, Any]) -> bool:
    """Whether a backward multiplies what comes in by the weight that the forward multiplied by, decoded."""
    calls = [node for node in backward.graph.nodes if node.op.startswith("call")]
    decoded = [node for node in calls if _names(node, "bitsandbytes.dequantize_4bit.default")]
    products = [node for node in calls if _short(node) == "matmul"]
    if len(decoded) != 1 or len(products) != 1 or not all(_short(node) in _BACKWARD for node in calls):
        return False
    format_ = (given["blocksize"], given["quant_type"], tuple(given["shapeB"]))
    incoming, weight = products[0].args
    while isinstance(weight, fx.Node) and weight.target == "to":
        weight = weight.args[0]
    same = (*decoded[0].args[2:4], tuple(decoded[0].args[4])) == format_  # type: ignore[arg-type]
    return same and weight is decoded[0] and isinstance(incoming, fx.Node) and incoming.op == "placeholder"


def _short(node: fx.Node) -> str:
    """A target's name without library and overload."""
    if isinstance(node.target, OpOverload):
        return str(node.target).split(".")[1]
    return str(getattr(node.target, "__name__", node.target))
