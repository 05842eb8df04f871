"""The passes over one graph, from the traced graph to the chosen matches and their ops.

Each takes the `Rewrite`, and returns counts for the log. Only the first and the last two change the graph: matches are
kept beside it, so a match that is not used has no effect.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from fastlora.graph.view import View
from fastlora.match.pattern import RAISED
from fastlora.match.rule import Anchor, GroupRule, Match, Rule
from fastlora.rewrite import quantized
from fastlora.rewrite.commit import commit
from fastlora.rewrite.legality import Legality
from fastlora.rewrite.refusal import Code, Refusal
from fastlora.rewrite.state import Counts, Rewrite
from fastlora.rewrite.verify import mismatch


def propose_quantized(state: Rewrite) -> Counts:
    """Replace products of 4-bit weights by linear layers of dequantized weights, so that rules match them.

    Before: `gemm_4bit(x, packed, ...)`. After: `linear(x, dequantize_4bit(packed, ...))`.
    """
    state.quantized = quantized.propose(state.gm) if state.reads_quantized else []
    return {"products": len(state.quantized)}


def read_graph(state: Rewrite) -> Counts:
    """Read each node as a canonical operation.

    Before: nodes, as the model's author spelled them. After: terms of canonical operations in `view`.
    """
    state.view = View(state.graph)
    return {"nodes": len(state.view.order)}


def find_candidates(state: Rewrite) -> Counts:
    """Mark the candidates of each op family by the anchors of its rules, whether or not one matches.

    Before: a view. After: `anchors`, which every report counts.
    """
    nodes_of: dict[Anchor, list[fx.Node]] = {}  # rules of a family share anchors, which may be slow predicates
    for rule in state.rules:
        if isinstance(rule, Rule) and (anchor := rule.anchor) is not None:
            if anchor not in nodes_of:
                nodes_of[anchor] = [node for node in state.view.producers() if _is_anchor(anchor, state.view, node)]
            candidates = state.anchors.setdefault(rule.op.family, {})
            for node in nodes_of[anchor]:
                candidates.setdefault(node, []).append(rule)
    return {family: len(candidates) for family, candidates in state.anchors.items()}


def _is_anchor(anchor: Anchor, view: View, node: fx.Node) -> bool:
    if isinstance(anchor, str):
        term = view.term(node)
        return term is not None and term.op == anchor
    return anchor(view, node)


def raise_ops(state: Rewrite) -> Counts:
    """Match the rules that read PyTorch's operations.

    Before: `add(linear(x, W), mul(linear(linear(x, A), B), s))`. After: the same graph, and a match of `lora_linear`
    in `proposed`, and in `view.raised` for the rules that fuse ops.
    """
    by_root: dict[str, list[Rule]] = {}
    for rule in state.rules:
        if isinstance(rule, Rule) and not rule.fuses:
            for op in rule.outputs[0].roots():
                by_root.setdefault(op, []).append(rule)
    before = len(state.proposed)
    for node in state.view.producers():
        term = state.view.term(node)
        for rule in by_root.get(term.op, ()) if term is not None else ():
            if (match := _match(state, rule, node)) is not None:
                state.proposed.append(match)
                if rule.result is None:  # otherwise the node is not the op itself
                    state.view.raised.setdefault(node, []).append(match)
    return {"matches": len(state.proposed) - before}


def fuse_ops(state: Rewrite) -> Counts:
    """Match the rules that read ops which other rules have found.

    Before: `lora_linear(glu(lora_linear(x), lora_linear(x)))`. After: a match of `lora_mlp` in `proposed` as well.
    """
    before = len(state.proposed)
    for rule in state.rules:
        if not isinstance(rule, Rule) or not rule.fuses:
            continue
        roots = rule.outputs[0].roots()
        for node in state.view.producers():
            term = state.view.term(node)
            names = {f"{RAISED}{m.op.name}" for m in state.view.raised.get(node, ())} | ({term.op} if term else set())
            if names & roots and (match := _match(state, rule, node)) is not None:
                state.proposed.append(match)
    return {"matches": len(state.proposed) - before}


def _match(state: Rewrite, rule: Rule, node: fx.Node) -> Match | None:
    """Return the match of a rule at a node if its conditions hold, as fusion rules must not build on another match."""
    match = rule.find(state.view, node)
    if match is None:
        return None
    if (reason := rule.failed_condition(match)) is not None:
        state.refused.append((match, Refusal(Code.CONDITION, match.root, reason)))
        return None
    rule.compute_attrs(match)
    return match


def check_legality(state: Rewrite) -> Counts:
    """Refuse the matches whose nodes an op cannot replace.

    Before: matches in `proposed`. After: each of them in `legal` or `refused`.
    """
    legality = Legality(state.view)
    legal = _without_refused(state, state.proposed, ((match, legality.refusal(match)) for match in state.proposed))
    state.legal += legal
    return {"legal": len(legal)}


def verify_numerics(state: Rewrite) -> Counts:
    """Refuse the matches whose ops compute something else, if verification is on.

    Before: matches in `legal`. After: each of them in `accepted` or `refused`.
    """
    verdicts = ((match, mismatch(match) if state.verify else None) for match in state.legal)
    accepted = _without_refused(state, state.legal, verdicts)
    state.accepted += accepted
    return {"accepted": len(accepted)}


def _without_refused(
    state: Rewrite, checked: list[Match], verdicts: Iterable[tuple[Match, Refusal | None]]
) -> list[Match]:
    """Return the matches without a refusal, record the refusals of the others, and clear the list `checked`."""
    passed = []
    for match, refusal in verdicts:
        if refusal is None:
            passed.append(match)
        else:
            state.refused.append((match, refusal))
    checked.clear()
    return passed


def group_ops(state: Rewrite) -> Counts:
    """Join accepted matches of one op that share an input.

    Before: `lora_linear(x, ...)` three times. After: a match of `lora_group(x, ...)` in `proposed` as well.
    """
    before = len(state.proposed)
    members = [match for match in state.accepted if match.rule.result is None]
    for rule in state.rules:
        if isinstance(rule, GroupRule):
            state.proposed += rule.find(state.view, members)
    return {"groups": len(state.proposed) - before}


def choose(state: Rewrite) -> Counts:
    """Choose disjoint matches: greedily by benefit, then by the nodes covered, then in graph order.

    Before: matches in `accepted`, which may overlap. After: each of them in `chosen` or `refused`.
    """
    claimed: dict[fx.Node, Match] = {}
    for match in sorted(state.accepted, key=lambda m: (-m.rule.benefit, -len(m.members), state.view.order[m.root])):
        owned = [member for member in match.members if member not in match.shared]
        winner = next((claimed[member] for member in owned if member in claimed), None)
        if winner is not None:
            text = f"{winner.rule} covers some of its nodes"
            state.refused.append((match, Refusal(Code.OVERLAP, match.root, text)))
        else:
            claimed.update(dict.fromkeys(owned, match))
            state.chosen.append(match)
    return {"chosen": len(state.chosen), "refused": len(state.refused)}


def commit_matches(state: Rewrite) -> Counts:
    """Replace the nodes of the chosen matches by their ops.

    Before: `F.silu(gate) * up`. After: `glu(gate, up, "silu", dtype)`.
    """
    if state.chosen:
        commit(state.gm, state.view, state.chosen)
    return {"nodes": len(state.graph.nodes)}


def restore_quantized(state: Rewrite) -> Counts:
    """Restore the products of 4-bit weights that no op has replaced.

    Before: `linear(x, dequantize_4bit(packed, ...))`. After: `gemm_4bit(x, packed, ...)`, as it was traced.
    """
    if state.quantized:
        quantized.restore(state.graph, state.quantized)
        state.gm.recompile()
    return {"nodes": len(state.graph.nodes)}
