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
    restore_quantized,
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
    restore_quantized,
)


def rewrite(
    gm: fx.GraphModule,
    rules: Sequence[AnyRule],
    verify: bool = False,
    reads_quantized: bool = True,
    passes: Sequence[Pass] = PASSES,
) -> list[Rewrite]:
    """Rewrite a traced module in place, including the bodies of its checkpointed regions.

    Args:
        gm: a graph as TorchDynamo passes it to a backend, with `meta["example_value"]` on its nodes.
        rules: the rules to apply; their order does not matter.
        verify: replay every distinct match in float64 against the op's reference, and refuse it if they differ.
        reads_quantized: read products of 4-bit weights as linear layers, for ops that read such weights.
        passes: the passes to run on each graph, in order.

    Returns:
        One `Rewrite` for each graph. Only the nodes of `chosen` matches change, and what further passes document.
    """
    rewrites = []
    for body in bodies(gm):
        state = Rewrite(body, rules, verify, reads_quantized, is_body=body is not gm)
        for run in passes:
            start = time.perf_counter()
            counts = run(state)
            state.records.append(PassRecord(run.__name__, time.perf_counter() - start, counts))
        rewrites.append(state)
    return rewrites
