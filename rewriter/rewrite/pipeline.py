"""One pass over a traced graph: raise, fuse, group, check, choose, commit.

Raising fills an overlay of semantic ops and leaves the graph alone; fusing and grouping work on that overlay; what is
legal competes by benefit and size; the winners, disjoint by construction, are committed. There is no fixpoint: raising
is monotone and committing only shrinks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from fastlora.graph.bodies import bodies
from fastlora.graph.view import View
from fastlora.match.matcher import RAISED
from fastlora.match.rule import Anchor, AnyRule, GroupRule, Match, Rule
from fastlora.rewrite.commit import commit
from fastlora.rewrite.legality import Legality
from fastlora.rewrite.quantized import propose, settle
from fastlora.rewrite.refusal import Code, Refusal
from fastlora.rewrite.verify import disagreement

_REACH = 12
"""How many steps from a candidate the top of a match is looked for when a miss is to be explained."""


@dataclass(frozen=True)
class NearMiss:
    """A candidate that is not fused, the rule that came closest to matching it, and why."""

    family: str
    node: fx.Node
    rule: str
    refusal: Refusal


@dataclass
class Rewrite:
    """What the pass did to one graph."""

    graph: fx.Graph
    view: View
    chosen: list[Match] = field(default_factory=list)
    refused: list[tuple[Match, Refusal]] = field(default_factory=list)
    anchors: dict[str, dict[fx.Node, list[Rule]]] = field(default_factory=dict)
    missed: list[NearMiss] = field(default_factory=list)
    deferred: list[fx.Node] = field(default_factory=list)
    seconds: float = 0.0

    def claimed(self) -> set[fx.Node]:
        """The nodes that a chosen match replaced, and the losses whose logits are deferred."""
        return {*(member for match in self.chosen for member in match.members), *self.deferred}


def rewrite(gm: fx.GraphModule, rules: Sequence[AnyRule], verify: bool = False, decodes: bool = True) -> list[Rewrite]:
    """Rewrites a traced module in place, the bodies of its checkpointed regions included.

    Args:
        gm: a graph as TorchDynamo hands it to a backend, with `meta["example_value"]` on its nodes.
        rules: the rules to apply; their order does not matter.
        verify: replay every distinct match in fp64 against the op's reference, and decline it if they differ.
        decodes: rules may take the products of 4-bit weights for linear layers, for ops that read these encoded.

    Returns:
        One `Rewrite` a graph. Nothing in a graph changes but what its `chosen` matches replaced.
    """
    done = []
    for body in bodies(gm):
        start = time.perf_counter()
        proposals = propose(body) if decodes else []
        result = _analyse(body.graph, rules, verify)
        if result.chosen:
            commit(body, result.view, result.chosen)
        if proposals:
            settle(body.graph, proposals)
            body.recompile()
        result.seconds = time.perf_counter() - start
        done.append(result)
    return done


def _analyse(graph: fx.Graph, rules: Sequence[AnyRule], verify: bool) -> Rewrite:
    view = View(graph)
    result = Rewrite(graph, view, anchors=_find_anchors(view, rules))
    found = list(_raise(result, [r for r in rules if isinstance(r, Rule) and not r.fuses]))
    found += list(_fuse(result, [r for r in rules if isinstance(r, Rule) and r.fuses]))
    legality = Legality(view)
    legal = list(_legal(result, found, legality, verify))
    for rule in rules:
        if isinstance(rule, GroupRule):
            legal += _legal(result, list(rule.find(view, legal)), legality, verify)
    _choose(result, legal)
    result.missed = _near_misses(result)
    return result


def _find_anchors(view: View, rules: Sequence[AnyRule]) -> dict[str, dict[fx.Node, list[Rule]]]:
    """The candidates of each op family, with the rules that are about them, whether or not one matches."""
    found: dict[str, dict[fx.Node, list[Rule]]] = {}
    marked: dict[Anchor, list[fx.Node]] = {}  # rules of a family share a predicate, which looks around
    for rule in rules:
        if isinstance(rule, Rule) and (anchor := rule.anchor) is not None:
            if anchor not in marked:
                marked[anchor] = [node for node in view.producers() if _is_anchor(anchor, view, node)]
            candidates = found.setdefault(rule.op.family, {})
            for node in marked[anchor]:
                candidates.setdefault(node, []).append(rule)
    return found


def _is_anchor(anchor: Anchor, view: View, node: fx.Node) -> bool:
    if isinstance(anchor, str):
        term = view.term(node)
        return term is not None and term.op == anchor
    return anchor(view, node)


def _near_misses(result: Rewrite) -> list[NearMiss]:
    """Each candidate that no chosen match covers, with the rule that came closest and what kept it from it."""
    claimed = result.claimed()
    return [
        NearMiss(family, node, *_why(result, node, about))
        for family, candidates in result.anchors.items()
        for node, about in candidates.items()
        if node not in claimed
    ]


def _why(result: Rewrite, anchor: fx.Node, about: list[Rule]) -> tuple[str, Refusal]:
    refused = [(match, refusal) for match, refusal in result.refused if anchor in match.members]
    if refused:
        match, refusal = max(refused, key=lambda pair: len(pair[0].members))
        return repr(match.rule), refusal
    for rule in about:
        for explain in rule.explanations:
            if (explained := explain(result.view, anchor)) is not None:
                return repr(rule), Refusal(Code.PATTERN, anchor, explained)
    depth, closest = 0, (repr(about[0]), "no rule of this family matches around this node")
    for rule in about:
        for root in _downstream(result.view, anchor):
            term = result.view.term(root)
            if term is None or term.op not in rule.outputs[0].roots():
                continue
            for members, reason in rule.trace(result.view, root).notes:
                if anchor in members and len(members) >= depth:  # of equally deep ones, the last was the best try
                    depth, closest = len(members), (repr(rule), f"{_nodes(members)} matched; {reason}")
    rule_name, text = closest
    return rule_name, Refusal(Code.PATTERN, anchor, text)


def _nodes(members: Sequence[fx.Node]) -> str:
    return f"{len(members)} node{'s' if len(members) > 1 else ''}"


def _downstream(view: View, anchor: fx.Node) -> Iterator[fx.Node]:
    """The nodes that depend on `anchor` within a few steps, nearest first."""
    frontier, seen = [anchor], {anchor}
    for _ in range(_REACH):
        yield from frontier
        users = [view.producer(user) for node in frontier for user in view.users(node)]
        frontier = [user for user in dict.fromkeys(users) if user not in seen]
        seen.update(frontier)


def _raise(result: Rewrite, rules: list[Rule]) -> Iterator[Match]:
    by_root: dict[str, list[Rule]] = {}
    for rule in rules:
        for op in rule.outputs[0].roots():
            by_root.setdefault(op, []).append(rule)
    for node in result.view.producers():
        term = result.view.term(node)
        for rule in by_root.get(term.op, ()) if term is not None else ():
            for match in _accepted(result, rule, node):
                result.view.raised.setdefault(node, []).append(match)
                yield match


def _fuse(result: Rewrite, rules: list[Rule]) -> Iterator[Match]:
    for rule in rules:
        roots = rule.outputs[0].roots()
        for node in result.view.producers():
            term = result.view.term(node)
            names = {f"{RAISED}{m.op.name}" for m in result.view.raised.get(node, ())} | ({term.op} if term else set())
            if names & roots:
                yield from _accepted(result, rule, node)


def _accepted(result: Rewrite, rule: Rule, node: fx.Node) -> Iterator[Match]:
    """The match of a rule at a node, if its conditions hold: what a rule refuses, no other rule may build upon."""
    match = rule.find(result.view, node)
    if match is None:
        return
    objection = rule.objection(match)
    if objection is not None:
        result.refused.append((match, Refusal(Code.CONDITION, match.root, objection)))
        return
    rule.complete(match)
    yield match


def _legal(result: Rewrite, found: list[Match], legality: Legality, verify: bool) -> Iterator[Match]:
    for match in found:
        refusal = legality.refusal(match)
        if refusal is None and verify:
            refusal = disagreement(match)
        if refusal is None:
            yield match
        else:
            result.refused.append((match, refusal))


def _choose(result: Rewrite, legal: list[Match]) -> None:
    """Greedy by benefit, then by the nodes covered, then by place; no node is claimed twice."""
    taken: dict[fx.Node, Match] = {}
    for match in sorted(legal, key=lambda m: (-m.rule.benefit, -len(m.members), result.view.order[m.root])):
        owned = [member for member in match.members if member not in match.shared]
        winner = next((taken[member] for member in owned if member in taken), None)
        if winner is not None:
            result.refused.append((match, Refusal(Code.OVERLAP, match.root, f"{winner.rule} covers some of its nodes")))
        else:
            taken.update(dict.fromkeys(owned, match))
            result.chosen.append(match)
