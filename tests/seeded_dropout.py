"""Compares rewritten graphs that draw seeds with functions whose dropout is computed from a seed."""

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
    """Compute what the rewritten graph computes instead of `F.dropout(x, p)`."""
    return reference(x, None, torch.randint(SEEDS, (1,)), p, x.dtype)


def assert_same(actual: Run, expected: Run, tolerance: float = 2e-6) -> None:
    assert [t.stride() for t in actual.outputs] == [t.stride() for t in expected.outputs]
    for value, truth in zip(actual.tensors(), expected.tensors(), strict=True):
        assert (value is None) == (truth is None)
        if value is not None and truth is not None:
            assert value.dtype == truth.dtype
            assert distance(value, truth) <= tolerance


def check(function: Function, own: Function, *inputs: Any, ops: list[str], tolerance: float = 2e-6) -> Outcome:
    """Assert that the rewritten function has these ops, and equals `own` for the same random state."""
    outcome = analyse(function, *inputs)
    assert outcome.ops == ops, outcome.turned_down()
    assert not outcome.misses
    outcome.assert_tidy()
    assert_same(outcome.rewritten, evaluate(own, inputs), tolerance)
    return outcome


def through_aot_autograd(function: Function, *inputs: Any) -> Run:
    """Run the rewritten graph through AOTAutograd, including its recomputation in the backward."""
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
