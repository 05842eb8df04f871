"""What rewritten graphs that draw seeds are compared with: the function with the dropout of a seed in it."""

from __future__ import annotations

from typing import Any

import torch
from graphs import Function, Outcome, Run, analyse, distance, evaluate
from torch import Tensor, fx

from fastlora.frontend.session import default_rules
from fastlora.kernels.formulas.dropout import SEEDS, reference
from fastlora.rewrite.pipeline import rewrite

P = 0.4


def drop(x: Tensor, p: float = P) -> Tensor:
    """What the rewritten graph computes in the place of `F.dropout(x, p)`."""
    return reference(x, None, torch.randint(SEEDS, (1,)), p, x.dtype)


def assert_same(mine: Run, its: Run, tolerance: float = 2e-6) -> None:
    assert [t.stride() for t in mine.outputs] == [t.stride() for t in its.outputs]
    for one, other in zip(mine.tensors(), its.tensors(), strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert one.dtype == other.dtype
            assert distance(one, other) <= tolerance


def check(function: Function, own: Function, *inputs: Any, ops: list[str], tolerance: float = 2e-6) -> Outcome:
    """The function, rewritten, is `own` for the same random state, and holds these ops."""
    outcome = analyse(function, *inputs)
    assert outcome.ops == ops, outcome.turned_down()
    assert not outcome.misses
    outcome.assert_tidy()
    assert_same(outcome.rewritten, evaluate(own, inputs), tolerance)
    return outcome


def through_aot_autograd(function: Function, *inputs: Any) -> Run:
    """A run of what AOTAutograd makes of the rewritten graph, with whatever it recomputes in the backward."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    compile_ = aot_autograd(
        fw_compiler=lambda gm, _: make_boxed_func(gm), partition_fn=min_cut_rematerialization_partition
    )

    def backend(gm: fx.GraphModule, given: Any) -> Any:
        rewrite(gm, default_rules())
        return compile_(gm, given)

    torch._dynamo.reset()
    return evaluate(torch.compile(function, backend=backend, fullgraph=True), inputs)
