"""The loss boundary of a graph that is traced whole: its logits are an output next to the loss.

Head and loss cannot become one op then, because the logits escape. Instead the head's product is deferred, which leaves
every other node as it is: the cross-entropy meets deferred logits when the graph runs, and so does the caller.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastlora.deferred import Tally, defer
from fastlora.engine import Rewrite
from fastlora.spelling import spelling_of
from fastlora.view import View


class DeferredProduct(nn.Module):
    """Stands for the head's `F.linear` in a graph that runs eagerly."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self._tally = tally

    def forward(self, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        plain = type(hidden) is torch.Tensor and type(weight) in (torch.Tensor, nn.Parameter)
        plain &= torch._C._is_torch_function_enabled()  # TorchDynamo runs a graph without where it has parameters of
        # subclasses, as bitsandbytes' are; what meets deferred logits there would not see that they are
        if plain and torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            return defer(hidden, weight, bias, self._tally)
        return F.linear(hidden, weight, bias)


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
