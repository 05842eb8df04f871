"""Rewriting a traced graph: an ordered list of passes, run on the graph and on the bodies of its regions.

There is no fixpoint: matches are found beside the graph, chosen once, and committed once.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import fx

from fastlora.graph.bodies import bodies
from fastlora.match.rule import AnyRule
from fastlora.rewrite.explain import explain_near_misses
from fastlora.rewrite.passes import (
    check_legality,
    choose,
    commit_matches,
    find_candidates,
    fuse_ops,
    group_ops,
    propose_quantized,
    raise_ops,
    read_graph,
    settle_quantized,
    verify_numerics,
)
from fastlora.rewrite.state import Pass, PassRecord, Rewrite

PASSES: tuple[Pass, ...] = (
    propose_quantized,
    read_graph,
    find_candidates,
    raise_ops,
    fuse_ops,
    check_legality,
    verify_numerics,
    group_ops,
    check_legality,  # of the groups
    verify_numerics,
    choose,
    explain_near_misses,
    commit_matches,
    settle_quantized,
)


def rewrite(
    gm: fx.GraphModule,
    rules: Sequence[AnyRule],
    verify: bool = False,
    decodes: bool = True,
    passes: Sequence[Pass] = PASSES,
) -> list[Rewrite]:
    """Rewrite a traced module in place, including the bodies of its checkpointed regions.

    Args:
        gm: a graph as TorchDynamo hands it to a backend, with `meta["example_value"]` on its nodes.
        rules: the rules to apply; their order does not matter.
        verify: replay every distinct match in float64 against the op's reference, and refuse it if they differ.
        decodes: read products of 4-bit weights as linear layers, for ops that take these weights in 4 bits.
        passes: what to run on each graph, in order.

    Returns:
        One `Rewrite` for each graph. Nothing in a graph changes except what its `chosen` matches replaced, and what
        further passes say.
    """
    done = []
    for body in bodies(gm):
        state = Rewrite(body, rules, verify, decodes, is_body=body is not gm)
        for run in passes:
            start = time.perf_counter()
            counts = run(state)
            state.records.append(PassRecord(run.__name__, time.perf_counter() - start, counts))
        done.append(state)
    return done
