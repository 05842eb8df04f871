"""The passes that defer logits, for a loss outside the graph, or a loss in it beside which the logits leave the graph.

Head and loss cannot become one op then. Instead the head's product is deferred, and every other node stays as it is:
the cross-entropy is given deferred logits, whether it runs in the graph or later, and so is the caller.
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
from fastlora.logits.defer import can_defer, defer, product_dtype
from fastlora.logits.deferred_logits import Tally
from fastlora.logits.recipe import Adapter
from fastlora.rewrite.refusal import Code, Refusal
from fastlora.rewrite.state import Counts, Pass, Rewrite


def _is_seen() -> bool:
    """Whether what meets deferred logits sees that they are. TorchDynamo runs a graph without PyTorch's function
    overrides where it has parameters of subclasses, as bitsandbytes' are."""
    return function_overrides_are_enabled()


class DeferredProduct(nn.Module):
    """Stands for the head's `F.linear` in a graph that runs eagerly."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if _is_seen() and (dtype := product_dtype(hidden, weight, bias)) is not None:
            return defer(hidden, weight, bias, dtype, dtype, self._tally)
        return F.linear(hidden, weight, bias)


class DeferredAdaptedProduct(nn.Module):
    """Stands for a head with an adapter, in a graph that runs eagerly; called with the arguments of `lora_linear`."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def forward(self, *values: Any) -> torch.Tensor:
        given = dict(zip(lora_linear.names, values, strict=True))
        x, weight, low = given["x"], given["weight"], Adapter(*(given[name] for name in Adapter._fields))
        if _is_seen() and can_defer(x, weight, given["bias"], low.lora_a, low.lora_b):
            return defer(x, weight, given["bias"], given["base_dtype"], given["out_dtype"], self._tally, low)
        made: torch.Tensor = lora_linear(**given)
        return made


def deferrals(tally: Tally, is_head: bool) -> tuple[Pass, ...]:
    """Return the passes that defer logits, to run after all others.

    Args:
        tally: counts what becomes of deferred logits.
        is_head: whether the graph is the model's output head, whose result is then deferred as well.
    """

    def defer_escaping_logits(state: Rewrite) -> Counts:
        """Defer the product behind each loss that is not fused because its logits are used elsewhere.

        Before: `logits = F.linear(x, W); cross_entropy(logits, labels)`, and `logits` is returned. After: the same with
        `logits = deferred_head(x, W)`, which the loss is computed from without its values.
        """
        if not state.is_body:
            _defer_losses(state, tally)
        return {"deferred": len(state.deferred)}

    def defer_head(state: Rewrite) -> Counts:
        """Defer the result of a graph that is an output head, with an adapter or without, and nothing else.

        Before: `return F.linear(x, W)`. After: `return deferred_head(x, W)`.
        """
        if not state.is_body:
            state.head_refusal = _defer_result(state.gm, tally)
            state.defers_head = state.head_refusal is None
        return {"deferred": int(state.defers_head)}

    return (defer_escaping_logits, defer_head) if is_head else (defer_escaping_logits,)


def _defer_result(gm: fx.GraphModule, tally: Tally) -> Refusal | None:
    """Defer what a head returns, or return why that is not possible."""
    (result,) = (node.args[0] for node in gm.graph.nodes if node.op == "output")
    if not isinstance(result, (tuple, list)) or len(result) != 1 or not isinstance(result[0], fx.Node):
        return Refusal(Code.HEAD, None, "the output head returns more than logits")
    (last,) = result
    found = _head(_without_idle_casts(last))
    if isinstance(found, Refusal):
        return found
    stand_in, arguments = found
    gm.add_submodule("deferred_head", stand_in(tally))
    with gm.graph.inserting_after(last):
        deferred = gm.graph.call_module("deferred_head", arguments)
    deferred.meta = dict(last.meta)
    last.replace_all_uses_with(deferred)
    _erase_unused(gm.graph, last)
    gm.recompile()
    return None


def _head(product: fx.Node) -> tuple[type[nn.Module], tuple[Any, ...]] | Refusal:
    """What stands for a head's product, with its arguments, or why nothing can."""
    node = product.args[0] if product.target is operator.getitem and product.args[1] == 0 else product
    spelling = spelling_of(product)
    if isinstance(node, fx.Node) and node.target is lora_linear.target:
        given = dict(zip(lora_linear.names, node.args, strict=True))
        if given["x_dropped"] is not None or given["seed"] is not None:
            text = "the output head's adapter has dropout, which the fused loss does not support"
            return Refusal(Code.HEAD, product, text)
        if given["lora_bias"] is not None:
            text = "the output head's adapter has a bias, which the fused loss does not support"
            return Refusal(Code.HEAD, product, text)
        stand_in: type[nn.Module] = DeferredAdaptedProduct
        arguments, weight = node.args, given["weight"]
    elif spelling is not None and spelling.op == "linear" and (bound := spelling.bind(product)) is not None:
        stand_in, weight = DeferredProduct, bound["weight"]
        arguments = tuple(bound[name] for name in ("input", "weight", "bias"))
    else:
        return Refusal(Code.HEAD, product, "the output head is more than a linear layer, with an adapter or without")
    if not _is_vocabulary(weight):
        text = "the output head's weight is not a plain matrix with more rows than columns, as a vocabulary's is"
        return Refusal(Code.HEAD, product, text)
    return stand_in, arguments


def _is_vocabulary(weight: Any) -> bool:
    """Whether it is a plain matrix with more rows than columns."""
    tensor = meta(weight)
    plain = tensor is not None and tensor.dim() == 2 and not is_wrapper_subclass(tensor)
    return plain and tensor is not None and known_less(tensor.shape[1], tensor.shape[0])


def _erase_unused(graph: fx.Graph, node: fx.Node) -> None:
    """Erase a node that nothing uses, and what it was made of by an operation without effects."""
    if node.users or node.op in ("placeholder", "get_attr"):
        return
    sources = node.all_input_nodes
    graph.erase_node(node)
    for source in sources:
        if source.target is lora_linear.target or source.target in CASTS or source.target is operator.getitem:
            _erase_unused(graph, source)


def _without_idle_casts(node: fx.Node) -> fx.Node:
    """What a value was before casts to the dtype that it has anyway."""
    while node.op == "call_method" and node.target in CASTS and isinstance(source := node.args[0], fx.Node):
        before, after = meta(source), meta(node)
        if before is None or after is None or (before.dtype, before.device) != (after.dtype, after.device):
            break
        node = source
    return node


def _defer_losses(state: Rewrite, tally: Tally) -> None:
    """Defer the logits of the losses that are refused because these escape; they are no near misses then."""
    claimed = state.claimed()
    escaping = {m.root for m, refusal in state.refused if m.op.family == "loss" and refusal.code is Code.ESCAPES}
    for anchor in state.anchors.get("loss", {}):
        if anchor in escaping and anchor not in claimed:
            product = _head_of(state.view, anchor)
            spelling = spelling_of(product)
            if spelling is not None and spelling.op == "linear" and not isinstance(_head(product), Refusal):
                _defer(state.gm, product, spelling.bind(product) or {}, tally)
                state.deferred.append(anchor)
    if state.deferred:
        state.missed = [miss for miss in state.missed if miss.node not in state.deferred]
        state.gm.recompile()


def _head_of(view: View, anchor: fx.Node) -> fx.Node:
    """The product that the logits of a matched loss come from."""
    node, term = anchor, view.term(anchor)
    while term is not None and term.op != "linear":
        node, term = view.producer(term.args["input"]), view.term(term.args["input"])
    return node


def _defer(gm: fx.GraphModule, node: fx.Node, arguments: dict[str, Any], tally: Tally) -> None:
    name = f"deferred_head_{len([n for n, _ in gm.named_children() if n.startswith('deferred_head')])}"
    gm.add_submodule(name, DeferredProduct(tally))
    with gm.graph.inserting_after(node):
        product = gm.graph.call_module(name, tuple(arguments[key] for key in ("input", "weight", "bias")))
    product.meta = dict(node.meta)
    node.replace_all_uses_with(product)
    gm.graph.erase_node(node)
