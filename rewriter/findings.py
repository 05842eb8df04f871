"""Turns rewrites of graphs into the sites and misses of a report."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import fx

from fastlora.engine import AnyRule, Rewrite, is_anchor
from fastlora.metadata import hint, meta
from fastlora.pattern import State, Trace
from fastlora.report import Miss, Site
from fastlora.rule import Match, Rule
from fastlora.view import View

_REACH = 12


def sites(rewrite: Rewrite, region: str, count: int) -> list[Site]:
    """The fused ops of one graph."""
    chosen = sorted(rewrite.chosen, key=lambda match: rewrite.view.order[match.root])
    fused = [
        Site(m.op.name, repr(m.rule), where(m.root, region), len(m.members), _bytes_saved(m), count) for m in chosen
    ]
    deferred = [
        Site("linear_cross_entropy", "deferred logits", where(anchor, region), 2, 0, count)
        for anchor in rewrite.deferred
    ]
    return fused + deferred


def misses(rewrite: Rewrite, rules: Sequence[AnyRule], region: str, count: int) -> list[Miss]:
    """The candidates that no chosen match covers, each with the most telling reason."""
    claimed = rewrite.claimed()
    found = []
    for family, anchors in rewrite.anchors.items():
        for anchor in anchors:
            if anchor not in claimed:
                rule, reason = _why(rewrite, rules, family, anchor)
                found.append(Miss(family, rule, where(anchor, region), reason, count))
    return found


def where(node: fx.Node, region: str = "") -> str:
    """The module path and the source line that a node comes from, e.g. `model.layers.0.mlp (modeling.py:62)`."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    inner = re.sub(r"^L\['\w+'\]\.?|\['|'\]|__self__\.?", "", stack[-1][0]) if stack else ""
    path = ".".join(part for part in (region, inner) if part) or "model"
    frames = re.findall(r'File "([^"]+)", line (\d+)', node.meta.get("stack_trace") or "")
    return f"{path} ({Path(frames[-1][0]).name}:{frames[-1][1]})" if frames else path


def _bytes_saved(match: Match) -> int:
    """The intermediates that no longer come into being, less the residuals that the op keeps instead."""
    outputs = set(match.outputs)
    views = {"slice", "transposed", "flatten", "reshape"}
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


def _why(rewrite: Rewrite, rules: Sequence[AnyRule], family: str, anchor: fx.Node) -> tuple[str, str]:
    """The rule that came closest to claiming an anchor, and what kept it from it."""
    refused = [(match, reason) for match, reason in rewrite.refused if anchor in match.members]
    if refused:
        match, reason = max(refused, key=lambda pair: len(pair[0].members))
        return repr(match.rule), reason
    view = rewrite.view
    about = [r for r in rules if isinstance(r, Rule) and r.op.family == family and is_anchor(r, view, anchor)]
    deepest: tuple[int, str, str] = (0, repr(about[0]), "no pattern of this family has it in this place")
    for rule in about:
        for root in _downstream(view, anchor):
            term = view.term(root)
            if term is None or term.op not in rule.outputs[0].roots():
                continue
            trace = Trace()
            for _ in rule.outputs[0].match(view, root, State(), trace):
                break
            for members, reason in trace.notes:
                if anchor in members and len(members) > deepest[0]:
                    deepest = (len(members), repr(rule), f"{len(members)} nodes deep: {reason}")
    return deepest[1:]


def _downstream(view: View, anchor: fx.Node) -> Iterator[fx.Node]:
    """The nodes that depend on `anchor` within a few steps, nearest first."""
    frontier, seen = [anchor], {anchor}
    for _ in range(_REACH):
        yield from frontier
        users = [view.producer(user) for node in frontier for user in view.users(node)]
        frontier = [user for user in dict.fromkeys(users) if user not in seen]
        seen.update(frontier)
