"""The operations on deferred logits that stay deferred, and how gradients pass back through them.

An operation on logits that changes rows, scales or widens is an operation on the hidden states or on the expression.
Each adds an `OpNode`, which records its adjoint: the one operation that takes a gradient back through it. Autograd
calls exactly that operation, so a deferred gradient recognizes it by name and arguments; of the gradients that it
carries for hidden states and parameters, only rows change. Other callers of the same operation, such as a hook, get the
same value: a node stands for a value, not for a place in autograd's graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastlora.logits.logits_expr import LogitsExpr

aten = torch.ops.aten
Grads = dict[str, torch.Tensor]
"""Gradients for hidden states (`x`, with the rows of a node) and parameters, by the argument names of the ops."""
OpKey = tuple[Any, ...]
"""An operation and its arguments, the same for all spellings of the operation."""


@dataclass(frozen=True, eq=False)
class OpNode:
    """An operation between the head's linear layer and a loss.

    Attributes:
        parent: the operation before; None for the linear layer itself.
        adjoint: the operation that takes a gradient to the parent.
        hidden_adjoint: takes a gradient of the hidden states to the parent's rows.
        only_rows_changed: whether the value is that of the linear layer up to a selection or order of its rows.
        split: if this is one of several pieces into which its parent was split, its index and how it was split.
    """

    parent: OpNode | None = None
    adjoint: OpKey = ()
    hidden_adjoint: Callable[[torch.Tensor], torch.Tensor] | None = None
    only_rows_changed: bool = True
    split: tuple[int, str] | None = None

    def grads_for_parent(self, grads: Grads) -> Grads:
        """Return the gradients with the parent's rows."""
        if self.hidden_adjoint is None or "x" not in grads:
            return grads
        return {**grads, "x": self.hidden_adjoint(grads["x"])}


@dataclass(frozen=True)
class DeferredOutput:
    """The deferred result of an operation: its expression and its node."""

    expr: LogitsExpr
    node: OpNode


Handler = Callable[[LogitsExpr, OpNode, torch.Tensor, torch.Tensor, Sequence[Any]], "DeferredOutput | None"]
"""Takes expression, node and meta tensor of the logits, the meta tensor of the result, and the operation's other
arguments; returns None if the logits have to be computed."""

RESHAPES = {
    aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.reshape.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip
ALIASES = {aten.detach.default, aten.alias.default}
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}


def _reshape(expr: LogitsExpr, node: OpNode, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    if result.dim() == 0 or result.shape[-1] != meta.shape[-1]:
        return None
    hidden = expr.hidden
    reshaped = hidden.reshape(*result.shape[:-1], hidden.shape[-1])
    adjoint = ("reshape", tuple(meta.shape))
    return _change_rows(expr, node, reshaped, adjoint, lambda dx: dx.reshape(hidden.shape))


def _slice(expr: LogitsExpr, node: OpNode, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    given: list[Any] = [*args, *(0, None, None, 1)[len(args) :]]
    dim, start, stop, step = given
    dim %= meta.dim()
    bounds = _slice_bounds(meta.shape[dim], start, stop, step)
    if dim == meta.dim() - 1:
        return None
    hidden = expr.hidden
    adjoint = ("slice", tuple(meta.shape), dim, *bounds)
    return _change_rows(
        expr, node, aten.slice(hidden, dim, *bounds), adjoint,
        lambda dx: aten.slice_backward(dx, list(hidden.shape), dim, *bounds),
    )  # fmt: skip


def _select(expr: LogitsExpr, node: OpNode, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    dim = args[0] % meta.dim()
    if dim == meta.dim() - 1:
        return None
    hidden, index = expr.hidden, args[1] % meta.shape[dim]
    adjoint = ("select", tuple(meta.shape), dim, index)
    return _change_rows(
        expr, node, hidden.select(dim, index), adjoint,
        lambda dx: aten.select_backward(dx, list(hidden.shape), dim, index),
    )  # fmt: skip


def _permute(expr: LogitsExpr, node: OpNode, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    order = _dim_order(meta.dim(), args)
    if order[-1] != meta.dim() - 1:
        return None
    inverse = tuple(order.index(dim) for dim in range(len(order)))
    return _change_rows(expr, node, expr.hidden.permute(order), ("permute", inverse), lambda dx: dx.permute(inverse))


def _mul(expr: LogitsExpr, node: OpNode, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    factor = args[0]
    return _scale(expr, node, ("mul", factor), factor) if _is_scale(meta, result, args) else None


def _div(expr: LogitsExpr, node: OpNode, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    divisor = args[0]
    return _scale(expr, node, ("div", divisor), 1.0 / divisor) if _is_scale(meta, result, args) else None


def _scale(expr: LogitsExpr, node: OpNode, adjoint: OpKey, factor: float) -> DeferredOutput:
    return DeferredOutput(expr.scaled(factor), OpNode(node, adjoint, only_rows_changed=False))


def _tanh(expr: LogitsExpr, node: OpNode, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    if expr.has_tanh:
        return None
    after = OpNode(node, ("tanh", node), only_rows_changed=False)  # no other node has this parent and this operation
    return DeferredOutput(replace(expr, has_tanh=True), after)


def _cast(expr: LogitsExpr, node: OpNode, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    if not result.is_floating_point() or torch.promote_types(meta.dtype, result.dtype) != result.dtype:
        return None
    if meta.dtype == result.dtype:
        return DeferredOutput(expr, node)
    after = OpNode(node, ("cast", meta.dtype), only_rows_changed=False)
    return DeferredOutput(replace(expr, dtype=result.dtype), after)


def _add_bias(expr: LogitsExpr, node: OpNode, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    """Add a bias, if the head has none and only rows have changed. The node stays: a sum passes gradients through."""
    other = args[0]
    if len(args) > 1 or expr.bias is not None or expr.adapter is not None or not expr.is_linear_output:
        return None
    if type(other) not in (torch.Tensor, torch.nn.Parameter) or other.is_inference():
        return None
    if (other.dtype, other.device, result.shape) != (expr.dtype, expr.hidden.device, meta.shape):
        return None
    if not 0 < other.dim() <= meta.dim():
        return None
    if other.shape[-1] != meta.shape[-1] or other.numel() != meta.shape[-1]:
        return None
    requires_grad = expr.requires_grad | {"bias"} if other.requires_grad else expr.requires_grad
    return DeferredOutput(replace(expr, bias=other.reshape(-1), requires_grad=requires_grad), node)


def _change_rows(
    expr: LogitsExpr,
    node: OpNode,
    hidden: torch.Tensor,
    adjoint: OpKey,
    hidden_adjoint: Callable[[torch.Tensor], torch.Tensor],
) -> DeferredOutput:
    after = OpNode(node, adjoint, hidden_adjoint, node.only_rows_changed)
    return DeferredOutput(replace(expr, hidden=hidden), after)


HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(RESHAPES, _reshape),
    aten.slice.Tensor: _slice,
    aten.select.int: _select,
    **dict.fromkeys((aten.transpose.int, aten.permute.default), _permute),
    aten.mul.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.tanh.default: _tanh,
    **dict.fromkeys((aten._to_copy.default, aten.clone.default), _cast),
    aten.add.Tensor: _add_bias,
}


def split(
    expr: LogitsExpr, node: OpNode, meta: torch.Tensor, func: Any, results: Sequence[torch.Tensor], args: Sequence[Any]
) -> list[DeferredOutput] | None:
    """Return the pieces into which the rows are split, or None if the last dimension is split."""
    is_unbind = func is aten.unbind.int
    dim = (args[0] if args else 0) if is_unbind else (args[1] if len(args) > 1 else 0)
    dim %= meta.dim()
    if dim == meta.dim() - 1:
        return None
    adjoint = ("stack" if is_unbind else "cat", dim)
    pieces, how = func(expr.hidden, *args), f"{len(results)} by {func} of {args}"
    return [
        DeferredOutput(replace(expr, hidden=piece), OpNode(node, adjoint, None, node.only_rows_changed, (i, how)))
        for i, piece in enumerate(pieces)
    ]


def undoes_split(func: Any, nodes: Sequence[OpNode], args: Sequence[Any]) -> bool:
    """Return whether `cat` or `stack` joins the gradients for all pieces of one split, in order."""
    first = nodes[0]
    name = {aten.cat.default: "cat", aten.stack.default: "stack"}.get(func)
    how = "" if first.split is None else first.split[1]
    is_complete = how.startswith(f"{len(nodes)} by ")
    in_order = all(n.parent is first.parent and n.split == (i, how) for i, n in enumerate(nodes))
    return is_complete and in_order and first.adjoint == (name, args[0] if args else 0)


def adjoint_key(func: Any, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> OpKey:
    """Return the key of an operation on a gradient, to compare with `OpNode.adjoint`; () for other operations."""
    if func in RESHAPES:
        return ("reshape", tuple(result.shape))
    if func is aten.slice_backward.default:
        sizes, dim, start, stop, step = args
        dim %= len(sizes)
        return ("slice", tuple(sizes), dim, *_slice_bounds(sizes[dim], start, stop, step))
    if func is aten.select_backward.default:
        sizes, dim, index = args
        return ("select", tuple(sizes), dim % len(sizes), index % sizes[dim])
    if func in (aten.transpose.int, aten.permute.default):
        return ("permute", _dim_order(meta.dim(), args))
    if func is aten._to_copy.default:
        return ("cast", result.dtype)
    if func in (aten.mul.Tensor, aten.div.Tensor) and _is_scale(meta, result, args):
        return ("mul" if func is aten.mul.Tensor else "div", args[0])
    if func is aten.tanh_backward.default and isinstance(after := getattr(args[0], "node", None), OpNode):
        return ("tanh", after.parent)
    return ()


def _is_scale(meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> bool:
    factor = args[0]
    is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
    return len(args) == 1 and is_number and factor > 0 and math.isfinite(factor) and result.dtype == meta.dtype


def _dim_order(dims: int, args: Sequence[Any]) -> tuple[int, ...]:
    """Return the order of dimensions after `transpose` or `permute`."""
    if isinstance(args[0], (list, tuple)):
        return tuple(dim % dims for dim in args[0])
    order = list(range(dims))
    first, second = args[0] % dims, args[1] % dims
    order[first], order[second] = second, first
    return tuple(order)


def _slice_bounds(size: int, start: int | None, stop: int | None, step: int) -> tuple[int, int, int]:
    begin, end, step = slice(start, stop, step).indices(size)
    return begin, max(begin, end), step
