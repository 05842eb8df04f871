"""The boundary between a graph and a loss outside of it, or beside which the logits leave it.

Head and loss cannot become one op then. Instead the head's product is deferred, which leaves every other node as it is:
the cross-entropy meets deferred logits, be it in the graph when that runs or later, and so does the caller.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastlora.deferred import Tally, begin, defer, is_worthwhile
from fastlora.engine import Rewrite
from fastlora.kernels.ops import lora_linear
from fastlora.metadata import known_less, meta
from fastlora.recipe import Adapter, Recipe
from fastlora.spelling import spelling_of
from fastlora.view import CASTS, View


def _is_seen() -> bool:
    """Whether what meets deferred logits sees that they are. TorchDynamo runs a graph without PyTorch's function
    overrides where it has parameters of subclasses, as bitsandbytes' are."""
    return torch._C._is_torch_function_enabled()


class DeferredProduct(nn.Module):
    """Stands for the head's `F.linear` in a graph that runs eagerly."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if _is_seen() and is_worthwhile(hidden, weight):
            return defer(hidden, weight, bias, self._tally)
        return F.linear(hidden, weight, bias)


class DeferredAdaptedProduct(nn.Module):
    """Stands for a head with an adapter, in a graph that runs eagerly; called with the arguments of `lora_linear`."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def forward(self, *values: Any) -> torch.Tensor:
        given = dict(zip(lora_linear.names, values, strict=True))
        x, weight, low = given["x"], given["weight"], Adapter(*(given[name] for name in Adapter._fields))
        if _is_seen() and is_worthwhile(x, weight, low.lora_a, low.lora_b):
            return begin(Recipe(x, weight, given["bias"], given["base_dtype"], given["out_dtype"], low), self._tally)
        made: torch.Tensor = lora_linear(**given)
        return made


def defer_adapted_head(gm: fx.GraphModule, tally: Tally) -> bool:
    """Defers the result of a graph that is a head with an adapter, and nothing else; whether it was one.

    A head has more outputs than inputs, as a vocabulary has. One that drops out what its adapter reads, or whose
    adapter has a bias, runs as it is: the loss takes neither.
    """
    (result,) = (node.args[0] for node in gm.graph.nodes if node.op == "output")
    if not isinstance(result, (tuple, list)) or len(result) != 1 or not isinstance(result[0], fx.Node):
        return False
    (last,) = result
    part = _without_idle_casts(last)
    node = part.args[0] if part.target is operator.getitem and part.args[1] == 0 else None
    if not isinstance(node, fx.Node) or node.target is not lora_linear.target:
        return False
    given = dict(zip(lora_linear.names, node.args, strict=True))
    weight = meta(given["weight"])
    if weight is None or not known_less(weight.shape[1], weight.shape[0]):
        return False
    if any(given[name] is not None for name in ("x_dropped", "seed", "lora_bias")):
        return False
    gm.add_submodule("deferred_head", DeferredAdaptedProduct(tally))
    with gm.graph.inserting_after(last):
        product = gm.graph.call_module("deferred_head", node.args)
    product.meta = dict(last.meta)
    last.replace_all_uses_with(product)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return True


def _without_idle_casts(node: fx.Node) -> fx.Node:
    """What a value was before casts to the dtype that it has anyway."""
    while node.op == "call_method" and node.target in CASTS and isinstance(source := node.args[0], fx.Node):
        before, after = meta(source), meta(node)
        if before is None or after is None or (before.dtype, before.device) != (after.dtype, after.device):
            break
        node = source
    return node


def defer_escaping_logits(gm: fx.GraphModule, rewrite: Rewrite, tally: Tally) -> None:
    """Defers the product behind each loss that was left alone only because its logits are used elsewhere."""
    claimed = rewrite.claimed()
    escaping = {m.root for m, reason in rewrite.refused if m.op.family == "loss" and reason.startswith("L1")}
    for anchor in rewrite.anchors.get("loss", {}):
        if anchor in escaping and anchor not in claimed:
            product = _head_of(rewrite.view, anchor)
            spelling = spelling_of(product)
            if spelling is not None and spelling.op == "linear":
                _defer(gm, product, spelling.bind(product) or {}, tally)
                rewrite.deferred.append(anchor)
    if rewrite.deferred:
        gm.recompile()


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
