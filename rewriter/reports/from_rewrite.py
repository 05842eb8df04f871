"""Extracting the sites and misses of a report from rewritten graphs."""

from __future__ import annotations

import re
from pathlib import Path

from torch import fx

from fastlora.graph.fake_values import hint, meta
from fastlora.match.rule import Match
from fastlora.reports.model import Miss, Site
from fastlora.rewrite.state import Rewrite


def sites(rewrite: Rewrite, region: str, count: int) -> list[Site]:
    """Return the fused ops of one graph."""
    chosen = sorted(rewrite.chosen, key=lambda match: rewrite.view.order[match.root])
    fused = [
        Site(m.op.name, repr(m.rule), where(m.root, region), len(m.members), _bytes_saved(m), count) for m in chosen
    ]
    deferred = [
        Site("linear_cross_entropy", "deferred logits", where(anchor, region), 2, 0, count)
        for anchor in rewrite.deferred
    ]
    return fused + deferred


def misses(rewrite: Rewrite, region: str, count: int) -> list[Miss]:
    """Return the candidates of one graph that are not fused."""
    return [Miss(miss.family, miss.rule, where(miss.node, region), str(miss.refusal), count) for miss in rewrite.missed]


def where(node: fx.Node, region: str = "") -> str:
    """Return the module path and source line of a node, e.g. `model.layers.0.mlp (modeling.py:62)`."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    inner = re.sub(r"^L\['\w+'\]\.?|\['|'\]|__self__\.?", "", stack[-1][0]) if stack else ""
    path = ".".join(part for part in (region, inner) if part) or "model"
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{path} ({Path(frames[-1][0]).name}:{frames[-1][1]})" if frames else path


def _bytes_saved(match: Match) -> int:
    """Return the bytes of intermediate tensors that are no longer computed."""
    outputs = set(match.outputs)
    views = {"slice", "transposed", "mT", "flatten", "reshape"}
    inner = [
        m for m in match.members if m not in outputs and (t := match.view.term(m)) is not None and t.op not in views
    ]
    return sum(_size(member) for member in inner)


def _size(node: fx.Node) -> int:
    tensor = meta(node)
    if tensor is None:
        return 0
    total = tensor.element_size()
    for size in tensor.shape:
        total *= hint(size)
    return int(total)
