"""Reading base layers with bitsandbytes' 4-bit weights as linear layers of dequantized weights.

TorchDynamo traces such a layer as the operator `bitsandbytes::gemm_4bit`, or, if its input requires a gradient, as an
autograd function whose forward is that operator, and whose backward dequantizes the weight and multiplies by it. Before
rules match a graph, `propose` replaces it by two nodes,

    W = dequantize_4bit(packed, absmax, ...)        y = linear(x, W, b)

and after matches are chosen, `restore` restores those that no op has replaced, so that they run as they were traced.
Ops that have replaced one read the 4-bit weight itself, and W is never computed.
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
"""The block size of nested scales, which is fixed in the operator."""
_BACKWARD = ("dequantize_4bit", "dequantize_blockwise", "iadd", "to", "matmul", "sum", "_set_grad_enabled", "view")
"""The operations in the backward of a product."""


@dataclass(frozen=True)
class Proposal:
    """A linear layer that replaces a product during matching, and the traced call to restore.

    Attributes:
        linear: the linear layer.
        target, args, kwargs, meta: the traced call.
        x, bias: the input and bias of the traced call, which passes may have replaced by the time it is restored.
    """

    linear: fx.Node
    target: fx.node.Target
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]
    x: fx.Node
    bias: fx.Node | None

    def restore(self, graph: fx.Graph, alive: set[fx.Node]) -> None:
        """Replace the linear layer by the traced call."""
        current = {self.bias: self.linear.args[2]}
        if self.x not in alive or _without_noop_casts(self.x) is not self.linear.args[0]:  # a pass has replaced x
            current[self.x] = self.linear.args[0]
        args, kwargs = fx.node.map_arg((self.args, self.kwargs), lambda node: current.get(node, node))
        with graph.inserting_before(self.linear):
            result = call = graph.create_node("call_function", self.target, args, kwargs)
            if _is_autograd_function(call):
                result = graph.call_function(operator.getitem, (call, 0))
        call.meta, result.meta = self.meta, dict(self.linear.meta)
        self.linear.replace_all_uses_with(result)
        graph.erase_node(self.linear)


def propose(gm: fx.GraphModule) -> list[Proposal]:
    """Replace each product of a 4-bit weight by a linear layer of the dequantized weight."""
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    products = [(node, args) for node in gm.graph.nodes if (args := _product(gm, node)) is not None]
    return [_propose(gm.graph, node, args, order) for node, args in products]


def restore(graph: fx.Graph, proposals: list[Proposal]) -> None:
    """Restore the products whose linear layers are still in the graph, and erase the unused inputs of the others."""
    alive = set(graph.nodes)
    for proposal in proposals:
        if proposal.linear in alive:
            proposal.restore(graph, alive)
    inputs: set[fx.Node] = set()
    for proposal in proposals:
        fx.node.map_arg((proposal.args, proposal.kwargs), inputs.add)
    for node in reversed(list(graph.nodes)):
        if node in inputs and not node.users and _is_removable(node):
            inputs.update(node.all_input_nodes)
            graph.erase_node(node)
    erase_unused(graph)


def erase_unused(graph: fx.Graph) -> None:
    """Erase dequantized weights without users, and move the others before their first user."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in order:
        if node.target is dequantize_4bit.target:
            if node.users:
                min(node.users, key=order.__getitem__).prepend(node)
            else:
                graph.erase_node(node)


def _is_removable(node: fx.Node) -> bool:
    """Return whether an input of a product has no effects, so that it can be erased if it has no users."""
    return node.op == "get_attr" or _is_view(node) or _without_noop_casts(node) is not node


def _is_view(node: fx.Node) -> bool:
    return node.op == "call_method" and node.target == "view"


def _propose(graph: fx.Graph, node: fx.Node, args: dict[str, Any], order: dict[fx.Node, int]) -> Proposal:
    rows, cols = args["shapeB"]
    example = meta(node)
    assert example is not None
    nested = args["absmax_8bit"] is not None
    values = dequantize_4bit.order({
        "packed": _source(args["B"]),
        "absmax": args["absmax_8bit"] if nested else args["absmax"],
        "nested_absmax": args["absmax"] if nested else None,
        "nested_code": args["absmax_code"],
        "offset": args["absmax_offset"],
        "blocksize": args["blocksize"],
        "nested_blocksize": _NESTED_BLOCKSIZE,
        "quant_type": args["quant_type"],
        "rows": rows,
        "cols": cols,
        "dtype": example.dtype,
    })  # fmt: skip
    with graph.inserting_after(max((v for v in values if isinstance(v, fx.Node)), key=order.__getitem__)):
        weight = graph.call_function(dequantize_4bit.target, tuple(values))
    with example.fake_mode:  # type: ignore[attr-defined]
        weight.meta["example_value"] = torch.empty(rows, cols, dtype=example.dtype, device=example.device)
    with graph.inserting_after(node):
        linear = graph.call_function(F.linear, (_without_noop_casts(args["A"]), weight, args["bias"]))
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear)
    call: Any = node.args[0] if node.target is operator.getitem else node
    proposal = Proposal(linear, call.target, call.args, call.kwargs, dict(call.meta), args["A"], args["bias"])
    for each in dict.fromkeys((node, call)):
        graph.erase_node(each)
    return proposal


def _product(gm: fx.GraphModule, node: fx.Node) -> dict[str, Any] | None:
    """Return the arguments of `gemm_4bit` by name, if a node is its product with a weight that is a graph input."""
    args = _gemm(node)
    if args is None and node.target is operator.getitem and node.args[1] == 0 and _is_autograd_function(node.args[0]):
        args = _gemm_of_function(gm, node.args[0])  # type: ignore[arg-type]
    if args is None:
        return None
    result, x = meta(node), meta(args["A"])
    if result is None or x is None or result.dtype != x.dtype:
        return None
    parts = [_source(args[name]) for name in ("B", "absmax", *_OPTIONAL[1:]) if args[name] is not None]
    if not all(isinstance(part, fx.Node) and part.op in ("placeholder", "get_attr") for part in parts):
        return None
    return args


def _source(packed: Any) -> Any:
    """Return the tensor that a packed weight is a view of; only its bytes, in order, matter."""
    while isinstance(packed, fx.Node) and _is_view(packed):
        packed = packed.args[0]
    return packed


def _without_noop_casts(x: fx.Node) -> fx.Node:
    """Return the value before casts that change nothing, which hide a norm from the ops that read it."""
    while x.op == "call_method" and x.target == "to" and isinstance(source := x.args[0], fx.Node):
        before, after = meta(source), meta(x)
        if before is None or after is None or (before.dtype, before.device) != (after.dtype, after.device):
            break
        x = source
    return x


def _gemm(node: fx.Node) -> dict[str, Any] | None:
    if not _calls_operator(node, "bitsandbytes.gemm_4bit.default"):
        return None
    args = dict.fromkeys(_OPTIONAL) | dict(zip((*_GEMM, *_OPTIONAL), node.args, strict=False)) | node.kwargs
    return args if all(name in args for name in _GEMM) else None


def _calls_operator(node: fx.Node, name: str) -> bool:
    """Return whether a node calls the operator of this name, whose library may not be installed."""
    return isinstance(node.target, OpOverload) and str(node.target) == name


def _is_autograd_function(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is torch.ops.higher_order.autograd_function_apply


def _gemm_of_function(gm: fx.GraphModule, call: fx.Node) -> dict[str, Any] | None:
    """Return the arguments of `gemm_4bit` in an autograd function, as values of the outer graph, or None if forward or
    backward compute anything else."""
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in call.users):
        return None
    forward, backward = (getattr(gm, str(source.target), None) for source in call.args[:2])  # type: ignore[union-attr]
    if not isinstance(forward, fx.GraphModule) or not isinstance(backward, fx.GraphModule):
        return None
    gemms = [args for node in forward.graph.nodes if (args := _gemm(node)) is not None]
    placeholders = [n for n in forward.graph.nodes if n.op == "placeholder"]
    if len(gemms) != 1 or len(placeholders) != len(call.args) - 2 or not _is_gemm_backward(backward, gemms[0]):
        return None
    outer = dict(zip(placeholders, call.args[2:], strict=True))
    args = {name: _source(value) for name, value in gemms[0].items()}
    if not all(value in outer for value in args.values() if isinstance(value, fx.Node)):
        return None
    results = next(iter(reversed(forward.graph.nodes))).args[0]
    first: Any = results[0][0] if isinstance(results[0], (tuple, list)) else results[0]
    if not isinstance(first, fx.Node) or _gemm(first) is None:
        return None
    _cast_weight_to_gradient(backward)
    return {name: outer[value] if isinstance(value, fx.Node) else value for name, value in args.items()}


def _cast_weight_to_gradient(backward: fx.GraphModule) -> None:
    """Make a backward cast the weight to the dtype of the gradient instead of the traced dtype, which may differ under
    autocast."""
    product = next(node for node in backward.graph.nodes if _target_name(node) == "matmul")
    gradient, weight = product.args
    with backward.graph.inserting_before(product):
        dtype = backward.graph.call_function(getattr, (gradient, "dtype"))
        cast = backward.graph.call_method("to", (weight, dtype))
    product.args = (gradient, cast)
    backward.recompile()


def _is_gemm_backward(backward: fx.GraphModule, args: dict[str, Any]) -> bool:
    """Return whether a backward multiplies the gradient by the weight that the forward multiplied by, dequantized."""
    calls = [node for node in backward.graph.nodes if node.op.startswith("call")]
    dequantized = [node for node in calls if _calls_operator(node, "bitsandbytes.dequantize_4bit.default")]
    products = [node for node in calls if _target_name(node) == "matmul"]
    if len(dequantized) != 1 or len(products) != 1 or not all(_target_name(node) in _BACKWARD for node in calls):
        return False
    format_ = (args["blocksize"], args["quant_type"], tuple(args["shapeB"]))
    gradient, weight = products[0].args
    while isinstance(weight, fx.Node) and weight.target == "to":
        weight = weight.args[0]
    same_format = (*dequantized[0].args[2:4], tuple(dequantized[0].args[4])) == format_  # type: ignore[arg-type]
    return same_format and weight is dequantized[0] and isinstance(gradient, fx.Node) and gradient.op == "placeholder"


def _target_name(node: fx.Node) -> str:
    """Return the name of a node's target without library and overload."""
    if isinstance(node.target, OpOverload):
        return str(node.target).split(".")[1]
    return str(getattr(node.target, "__name__", node.target))
