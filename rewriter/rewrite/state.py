"""The state of one graph while passes rewrite it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import fx

from fastlora.graph.view import View
from fastlora.match.rule import AnyRule, Match, Rule
from fastlora.rewrite.quantized import Proposal
from fastlora.rewrite.refusal import Refusal

Counts = dict[str, int]


@dataclass(frozen=True)
class PassRecord:
    """One run of a pass: its name, its time, and its counts."""

    name: str
    seconds: float
    counts: Counts


@dataclass(frozen=True)
class NearMiss:
    """A candidate that is not fused, the rule that came closest to matching it, and why."""

    family: str
    node: fx.Node
    rule: str
    refusal: Refusal


@dataclass
class Rewrite:
    """The rewriting of one graph. A pass reads and fills the fields below; only the last passes change the graph.

    Attributes:
        gm: the graph.
        rules: the rules to apply; their order does not matter.
        verify: whether to replay every distinct match in float64 against its op's reference.
        reads_quantized: whether to read products of 4-bit weights as linear layers, for ops that read such weights.
        is_body: whether the graph is a region of another graph, such as a checkpointed one.
        quantized: the products that are read so, with what is needed to restore them.
        view: the canonical view of the graph.
        anchors: the candidates of each op family, with the rules that apply to them.
        proposed: matches that are not yet checked.
        legal: matches that passed the legality checks.
        accepted: legal matches that passed verification, or all if it is off.
        refused: matches that are not used, and why.
        chosen: disjoint matches that replace their nodes.
        missed: candidates that no chosen match covers.
        deferred: losses whose logits are deferred, which count as fused.
        defers_head: whether the graph is an output head that now defers its logits.
        head_refusal: why the graph, which is an output head, cannot defer its logits.
        records: the passes that ran, in order.
    """

    gm: fx.GraphModule
    rules: Sequence[AnyRule]
    verify: bool = False
    reads_quantized: bool = True
    is_body: bool = False
    quantized: list[Proposal] = field(default_factory=list)
    view: View = field(init=False)
    anchors: dict[str, dict[fx.Node, list[Rule]]] = field(default_factory=dict)
    proposed: list[Match] = field(default_factory=list)
    legal: list[Match] = field(default_factory=list)
    accepted: list[Match] = field(default_factory=list)
    refused: list[tuple[Match, Refusal]] = field(default_factory=list)
    chosen: list[Match] = field(default_factory=list)
    missed: list[NearMiss] = field(default_factory=list)
    deferred: list[fx.Node] = field(default_factory=list)
    defers_head: bool = False
    head_refusal: Refusal | None = None
    records: list[PassRecord] = field(default_factory=list)

    @property
    def graph(self) -> fx.Graph:
        return self.gm.graph

    def claimed(self) -> set[fx.Node]:
        """Return the nodes that a chosen match replaces, and the losses whose logits are deferred."""
        return {*(member for match in self.chosen for member in match.members), *self.deferred}


Pass = Callable[[Rewrite], Counts]
