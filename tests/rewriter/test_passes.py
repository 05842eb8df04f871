"""The ordered list of passes: each is recorded with its time and counts, and further passes run after it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from graphs import analyse, lora, randn, trace
from torch import Tensor

from fastlora.frontend.session import default_rules
from fastlora.rewrite.pipeline import PASSES, rewrite
from fastlora.rewrite.state import Counts, Rewrite

X = randn(2, 3, 16)
LAYER = (randn(24, 16, grad=False), randn(4, 16), randn(24, 4))
OTHER = (randn(24, 16, grad=False, seed=1), randn(4, 16, seed=2), randn(24, 4, seed=2))


def _counts(made: Rewrite, name: str) -> list[Counts]:
    return [record.counts for record in made.records if record.name == name]


def two_layers(x: Tensor, *layers: Tensor) -> tuple[Tensor, Tensor]:
    return lora(x, *layers[:3]), lora(x, *layers[3:])


def test_each_pass_records_its_name_seconds_and_counts() -> None:
    (made,) = analyse(two_layers, X, *LAYER, *OTHER).rewrites
    assert [record.name for record in made.records] == [run.__name__ for run in PASSES]
    assert all(record.seconds >= 0 for record in made.records)
    assert _counts(made, "find_candidates")[0]["lora"] == 2
    assert _counts(made, "group_ops") == [{"groups": 1}]
    assert _counts(made, "check_legality")[1] == {"legal": 1}
    assert _counts(made, "explain_near_misses") == [{"missed": 0}]


def test_every_match_is_either_chosen_or_refused() -> None:
    (made,) = analyse(two_layers, X, *LAYER, *OTHER).rewrites
    assert not made.proposed
    assert not made.legal
    assert {id(m) for m in made.accepted} <= {id(m) for m in made.chosen} | {id(m) for m, _ in made.refused}


def test_further_passes_see_the_rewritten_graph() -> None:
    seen: list[str] = []

    def look(state: Rewrite) -> Counts:
        seen.extend(str(node.target) for node in state.graph.nodes if node.op == "call_function")
        return {}

    gm, _ = trace(lambda gate, up: F.silu(gate) * up, (X, X))
    (made,) = rewrite(gm, default_rules(), passes=(*PASSES, look))
    assert made.records[-1].name == "look"
    assert any("glu" in target for target in seen)
    assert not any("silu" in target for target in seen)


def test_checkpointed_bodies_run_through_the_same_passes() -> None:
    from torch.utils.checkpoint import checkpoint

    def function(x: Tensor, *layer: Tensor) -> Tensor:
        return torch.sin(checkpoint(lora, x, *layer, use_reentrant=False))

    outer, body = analyse(function, X, *LAYER).rewrites
    assert (outer.is_body, body.is_body) == (False, True)
    assert [record.name for record in body.records] == [run.__name__ for run in PASSES]
    assert [match.op.name for match in body.chosen] == ["lora_linear"]
