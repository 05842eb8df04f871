"""The passes that defer logits, if the loss is outside the graph, or the graph returns the logits beside the loss.

Head and loss cannot become one op then. Instead the head returns deferred logits, and every other node stays unchanged:
the cross-entropy reads deferred logits, whether it runs in the graph or later, and the caller gets deferred logits.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastlora.compat.dispatch import function_overrides_are_enabled, is_wrapper_subclass
from fastlora.graph.canonical_ops import spelling_of
from fastlora.graph.fake_values import known_less, meta
from fastlora.graph.readers import CASTS
from fastlora.graph.view import View
from fastlora.kernels.ops import lora_linear
from fastlora.logits.defer import can_defer, defer, linear_dtype
from fastlora.logits.deferred_logits import DeferralStats
from fastlora.logits.logits_expr import Adapter
from fastlora.rewrite.refusal import Code, Refusal
from fastlora.rewrite.state import Counts, Pass, Rewrite


def _overrides_apply() -> bool:
    """Return whether functions of deferred logits are overridden. TorchDynamo disables function overrides in graphs
    with parameters of subclasses, such as bitsandbytes'."""
    return function_overrides_are_enabled()


class DeferredHead(nn.Module):
    """Replaces the head's `F.linear` in a graph that runs eagerly."""

    def __init__(self, stats: DeferralStats) -> None:
        super().__init__()
        self._stats = stats

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if _overrides_apply() and (dtype := linear_dtype(hidden, weight, bias)) is not None:
            return defer(hidden, weight, bias, dtype, dtype, self._stats)
        return F.linear(hidden, weight, bias)


class DeferredLoRAHead(nn.Module):
    """Replaces a head with an adapter in a graph that runs eagerly; takes the arguments of `lora_linear`, in order."""

    def __init__(self, stats: DeferralStats) -> None:
        super().__init__()
        self._stats = stats

    def forward(self, *values: Any) -> torch.Tensor:
        given = dict(zip(lora_linear.names, values, strict=True))
        x, weight, adapter = given["x"], given["weight"], Adapter(*(given[name] for name in Adapter._fields))
        if _overrides_apply() and can_defer(x, weight, given["bias"], adapter.lora_a, adapter.lora_b):
            return defer(x, weight, given["bias"], given["base_dtype"], given["out_dtype"], self._stats, adapter)
        output: torch.Tensor = lora_linear(**given)
        return output


def deferral_passes(stats: DeferralStats, is_head: bool) -> tuple[Pass, ...]:
    """Return the passes that defer logits, to run after all others.

    Args:
        stats: counts what happens to deferred logits.
        is_head: whether the graph is the model's output head, whose result is also deferred then.
    """

    def defer_escaping_logits(state: Rewrite) -> Counts:
        """Defer the logits of each loss that is not fused because its logits are used elsewhere.

        Before: `logits = F.linear(x, W); cross_entropy(logits, labels)`, and `logits` is returned. After: the same with
        `logits = deferred_head(x, W)`; the loss does not compute the logits.
        """
        if not state.is_body:
            _defer_losses(state, stats)
        return {"deferred": len(state.deferred)}

    def defer_head(state: Rewrite) -> Counts:
        """Defer the result of a graph that is only an output head, with or without an adapter.

        Before: `return F.linear(x, W)`. After: `return deferred_head(x, W)`.
        """
        if not state.is_body:
            state.head_refusal = _defer_result(state.gm, stats)
            state.defers_head = state.head_refusal is None
        return {"deferred": int(state.defers_head)}

    return (defer_escaping_logits, defer_head) if is_head else (defer_escaping_logits,)


def _defer_result(gm: fx.GraphModule, stats: DeferralStats) -> Refusal | None:
    """Defer the result of a head, or return why that is not possible."""
    (result,) = (node.args[0] for node in gm.graph.nodes if node.op == "output")
    if not isinstance(result, (tuple, list)) or len(result) != 1 or not isinstance(result[0], fx.Node):
        return Refusal(Code.HEAD, None, "the output head returns more than logits")
    (last,) = result
    replacement = _deferred_head(_without_noop_casts(last))
    if isinstance(replacement, Refusal):
        return replacement
    module_class, arguments = replacement
    gm.add_submodule("deferred_head", module_class(stats))
    with gm.graph.inserting_after(last):
        deferred = gm.graph.call_module("deferred_head", arguments)
    deferred.meta = dict(last.meta)
    last.replace_all_uses_with(deferred)
    _erase_unused(gm.graph, last)
    gm.recompile()
    return None


def _deferred_head(head: fx.Node) -> tuple[type[nn.Module], tuple[Any, ...]] | Refusal:
    """Return the class of the module that replaces a head, and its arguments, or why none can."""
    node = head.args[0] if head.target is operator.getitem and head.args[1] == 0 else head
    spelling = spelling_of(head)
    if isinstance(node, fx.Node) and node.target is lora_linear.target:
        given = dict(zip(lora_linear.names, node.args, strict=True))
        if given["x_dropped"] is not None or given["seed"] is not None:
            text = "the output head's adapter has dropout, which the fused loss does not support"
            return Refusal(Code.HEAD, head, text)
        if given["lora_bias"] is not None:
            text = "the output head's adapter has a bias, which the fused loss does not support"
            return Refusal(Code.HEAD, head, text)
        module_class: type[nn.Module] = DeferredLoRAHead
        arguments, weight = node.args, given["weight"]
    elif spelling is not None and spelling.op == "linear" and (bound := spelling.bind(head)) is not None:
        module_class, weight = DeferredHead, bound["weight"]
        arguments = tuple(bound[name] for name in ("input", "weight", "bias"))
    else:
        return Refusal(Code.HEAD, head, "the output head is more than a linear layer, with an adapter or without")
    if not _is_vocabulary(weight):
        text = "the output head's weight is not a plain matrix with more rows than columns, as a vocabulary's is"
        return Refusal(Code.HEAD, head, text)
    return module_class, arguments


def _is_vocabulary(weight: Any) -> bool:
    """Return whether a weight is a plain matrix with more rows than columns."""
    tensor = meta(weight)
    plain = tensor is not None and tensor.dim() == 2 and not is_wrapper_subclass(tensor)
    return plain and tensor is not None and known_less(tensor.shape[1], tensor.shape[0])


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node without users, and its inputs that then have none and are casts, adapters or items of a tuple."""
    if node.users or node.op in ("placeholder", "get_attr"):
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        if source.target is lora_linear.target or source.target in CASTS or source.target is operator.getitem:
            _erase_unused(graph, source)


def _without_noop_casts(node: fx.Node) -> fx.Node:
    """Return the value before casts to the dtype and device that it already has."""
    while node.op == "call_method" and node.target in CASTS and isinstance(source := node.args[0], fx.Node):
        before, after = meta(source), meta(node)
        if before is None or after is None or (before.dtype, before.device) != (after.dtype, after.device):
            break
        node = source
    return node


def _defer_losses(state: Rewrite, stats: DeferralStats) -> None:
    """Defer the logits of losses that are refused because their logits escape, and drop their near misses."""
    claimed = state.claimed()
    escaping = {m.root for m, refusal in state.refused if m.op.family == "loss" and refusal.code is Code.ESCAPES}
    for anchor in state.anchors.get("loss", {}):
        if anchor in escaping and anchor not in claimed:
            head = _head_of(state.view, anchor)
            spelling = spelling_of(head)
            if spelling is not None and spelling.op == "linear" and not isinstance(_deferred_head(head), Refusal):
                _defer(state.gm, head, spelling.bind(head) or {}, stats)
                state.deferred.append(anchor)
    if state.deferred:
        state.missed = [miss for miss in state.missed if miss.node not in state.deferred]
        state.gm.recompile()


def _head_of(view: View, anchor: fx.Node) -> fx.Node:
    """Return the linear layer that computes the logits of a matched loss."""
    node, term = anchor, view.term(anchor)
    while term is not None and term.op != "linear":
        node, term = view.producer(term.args["input"]), view.term(term.args["input"])
    return node


def _defer(gm: fx.GraphModule, node: fx.Node, arguments: dict[str, Any], stats: DeferralStats) -> None:
    name = f"deferred_head_{len([n for n, _ in gm.named_children() if n.startswith('deferred_head')])}"
    gm.add_submodule(name, DeferredHead(stats))
    with gm.graph.inserting_after(node):
        deferred = gm.graph.call_module(name, tuple(arguments[key] for key in ("input", "weight", "bias")))
    deferred.meta = dict(node.meta)
    node.replace_all_uses_with(deferred)
    gm.graph.erase_node(node)
