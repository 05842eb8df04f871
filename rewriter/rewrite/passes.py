"""The passes over one graph, from the traced graph to the chosen matches and their ops.

Each is a function of the `Rewrite` that returns what it counted. All but the first and the last two leave the graph
alone: matches are kept beside it, so a match that is not used costs nothing and leaves no trace.
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
from fastlora.rewrite.verify import disagreement


def propose_quantized(state: Rewrite) -> Counts:
    """Write products of 4-bit weights as linear layers.

    Before: `gemm_4bit(x, packed, ...)`. After: `linear(x, dequantize_4bit(packed, ...))`.
    """
    state.quantized = quantized.propose(state.gm) if state.decodes else []
    return {"products": len(state.quantized)}


def read_graph(state: Rewrite) -> Counts:
    """Read what each node means.

    Before: nodes, as the model's author spelled them. After: terms of canonical operations in `view`.
    """
    state.view = View(state.graph)
    return {"nodes": len(state.view.order)}


def find_candidates(state: Rewrite) -> Counts:
    """Mark the candidates of each op family by the anchors of its rules, whether or not one matches.

    Before: a view. After: `anchors`, which every report counts.
    """
    marked: dict[Anchor, list[fx.Node]] = {}  # rules of a family share a predicate, which looks around
    for rule in state.rules:
        if isinstance(rule, Rule) and (anchor := rule.anchor) is not None:
            if anchor not in marked:
                marked[anchor] = [node for node in state.view.producers() if _is_anchor(anchor, state.view, node)]
            candidates = state.anchors.setdefault(rule.op.family, {})
            for node in marked[anchor]:
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
    """The match of a rule at a node if its conditions hold: no other rule may build on a match that its own refuses."""
    match = rule.find(state.view, node)
    if match is None:
        return None
    if (objection := rule.objection(match)) is not None:
        state.refused.append((match, Refusal(Code.CONDITION, match.root, objection)))
        return None
    rule.complete(match)
    return match


def check_legality(state: Rewrite) -> Counts:
    """Refuse the matches whose nodes an op cannot replace.

    Before: matches in `proposed`. After: each of them in `legal` or `refused`.
    """
    legality = Legality(state.view)
    legal = _keep(state, state.proposed, ((match, legality.refusal(match)) for match in state.proposed))
    state.legal += legal
    return {"legal": len(legal)}


def verify_numerics(state: Rewrite) -> Counts:
    """Refuse the matches that compute something else than their ops, if verification is on.

    Before: matches in `legal`. After: each of them in `accepted` or `refused`.
    """
    verdicts = ((match, disagreement(match) if state.verify else None) for match in state.legal)
    accepted = _keep(state, state.legal, verdicts)
    state.accepted += accepted
    return {"accepted": len(accepted)}


def _keep(state: Rewrite, waiting: list[Match], verdicts: Iterable[tuple[Match, Refusal | None]]) -> list[Match]:
    """Return the matches without a refusal, and note the refusals of the others; nothing is left waiting."""
    kept = []
    for match, refusal in verdicts:
        if refusal is None:
            kept.append(match)
        else:
            state.refused.append((match, refusal))
    waiting.clear()
    return kept


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
    taken: dict[fx.Node, Match] = {}
    for match in sorted(state.accepted, key=lambda m: (-m.rule.benefit, -len(m.members), state.view.order[m.root])):
        owned = [member for member in match.members if member not in match.shared]
        winner = next((taken[member] for member in owned if member in taken), None)
        if winner is not None:
            text = f"{winner.rule} covers some of its nodes"
            state.refused.append((match, Refusal(Code.OVERLAP, match.root, text)))
        else:
            taken.update(dict.fromkeys(owned, match))
            state.chosen.append(match)
    return {"chosen": len(state.chosen), "refused": len(state.refused)}


def commit_matches(state: Rewrite) -> Counts:
    """Replace the nodes of the chosen matches by their ops.

    Before: `F.silu(gate) * up`. After: `glu(gate, up, "silu", dtype)`.
    """
    if state.chosen:
        commit(state.gm, state.view, state.chosen)
    return {"nodes": len(state.graph.nodes)}


def settle_quantized(state: Rewrite) -> Counts:
    """Restore the products of 4-bit weights that no op took.

    Before: `linear(x, dequantize_4bit(packed, ...))`. After: `gemm_4bit(x, packed, ...)`, as it was traced.
    """
    if state.quantized:
        quantized.settle(state.graph, state.quantized)
        state.gm.recompile()
    return {"nodes": len(state.graph.nodes)}
