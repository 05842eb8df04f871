"""Why a candidate is not fused: the refusal of the largest match around it, or how far a rule came."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from fastlora.graph.view import View
from fastlora.match.rule import Rule
from fastlora.rewrite.refusal import Code, Refusal
from fastlora.rewrite.state import Counts, NearMiss, Rewrite

_REACH = 12
"""How many steps from a candidate the top of a match is looked for."""


def explain_near_misses(state: Rewrite) -> Counts:
    """Say of each candidate that no chosen match covers which rule came closest, and why it does not match.

    Before: `anchors`, `chosen` and `refused`. After: `missed`. The graph must not have changed since it was read.
    """
    claimed = state.claimed()
    state.missed = [
        NearMiss(family, node, *_why(state, node, about))
        for family, candidates in state.anchors.items()
        for node, about in candidates.items()
        if node not in claimed
    ]
    return {"missed": len(state.missed)}


def _why(state: Rewrite, anchor: fx.Node, about: list[Rule]) -> tuple[str, Refusal]:
    refused = [(match, refusal) for match, refusal in state.refused if anchor in match.members]
    if refused:
        match, refusal = max(refused, key=lambda pair: len(pair[0].members))
        return repr(match.rule), refusal
    for rule in about:
        for explain in rule.explanations:
            if (explained := explain(state.view, anchor)) is not None:
                return repr(rule), Refusal(Code.PATTERN, anchor, explained)
    return _closest(state.view, anchor, about)


def _closest(view: View, anchor: fx.Node, about: list[Rule]) -> tuple[str, Refusal]:
    """The rule that matched most nodes around a candidate before it failed, and what failed then."""
    depth, closest, text = 0, about[0], "no rule of this family matches around this node"
    for rule in about:
        for root in _downstream(view, anchor):
            term = view.term(root)
            if term is None or term.op not in rule.outputs[0].roots():
                continue
            for members, reason in rule.trace(view, root).notes:
                if anchor in members and len(members) >= depth:  # of equally deep ones, the last was the best try
                    depth, closest = len(members), rule
                    text = f"{depth} node{'s' if depth > 1 else ''} matched; {reason}"
    return repr(closest), Refusal(Code.PATTERN, anchor, text)


def _downstream(view: View, anchor: fx.Node) -> Iterator[fx.Node]:
    """The nodes that depend on `anchor` within a few steps, nearest first."""
    frontier, seen = [anchor], {anchor}
    for _ in range(_REACH):
        yield from frontier
        users = [view.producer(user) for node in frontier for user in view.users(node)]
        frontier = [user for user in dict.fromkeys(users) if user not in seen]
        seen.update(frontier)
