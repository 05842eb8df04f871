"""Explaining why a candidate is not fused: the refusal of its largest match, or the rule that came closest to a
match."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fastlora.graph.view import View
from fastlora.match.rule import Rule
from fastlora.rewrite.refusal import Code, Refusal
from fastlora.rewrite.state import Counts, NearMiss, Rewrite

_MAX_STEPS = 12
"""Steps from a candidate to its users within which the root of a match is searched."""


def explain_near_misses(state: Rewrite) -> Counts:
    """Record for each candidate that no chosen match covers which rule came closest, and why it does not match.

    Before: `anchors`, `chosen` and `refused`. After: `missed`. The graph must not have changed since it was read.
    """
    claimed = state.claimed()
    state.missed = [
        NearMiss(family, node, *_why(state, node, rules))
        for family, candidates in state.anchors.items()
        for node, rules in candidates.items()
        if node not in claimed
    ]
    return {"missed": len(state.missed)}


def _why(state: Rewrite, anchor: fx.Node, rules: list[Rule]) -> tuple[str, Refusal]:
    """Return the rule that came closest to fusing a candidate, and why it did not."""
    refused = [(match, refusal) for match, refusal in state.refused if anchor in match.members]
    if refused:
        match, refusal = max(refused, key=lambda pair: len(pair[0].members))
        return repr(match.rule), refusal
    for rule in rules:
        for explain in rule.explanations:
            if (explained := explain(state.view, anchor)) is not None:
                return repr(rule), Refusal(Code.PATTERN, anchor, explained)
    return _closest(state.view, anchor, rules)


def _closest(view: View, anchor: fx.Node, rules: list[Rule]) -> tuple[str, Refusal]:
    """Return the rule that matched most nodes around a candidate before it failed, and why it failed."""
    depth, closest, text = 0, rules[0], "no rule of this family matches around this node"
    for rule in rules:
        for root in _downstream(view, anchor):
            term = view.term(root)
            if term is None or term.op not in rule.outputs[0].roots():
                continue
            for members, reason in rule.trace(view, root).notes:
                if anchor in members and len(members) >= depth:  # among equally deep failures, the last came furthest
                    depth, closest = len(members), rule
                    text = f"{depth} node{'s' if depth > 1 else ''} matched; {reason}"
    return repr(closest), Refusal(Code.PATTERN, anchor, text)


def _downstream(view: View, anchor: fx.Node) -> Iterator[fx.Node]:
    """Yield the nodes that depend on `anchor` within a few steps, nearest first."""
    frontier, seen = [anchor], {anchor}
    for _ in range(_MAX_STEPS):
        yield from frontier
        users = [view.producer(user) for node in frontier for user in view.users(node)]
        frontier = [user for user in dict.fromkeys(users) if user not in seen]
        seen.update(frontier)
