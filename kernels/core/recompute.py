"""Recomputation in the backward of the widest activations, at the cost of one or two products of a layer.

Unlike `DerivedArgument`, which recomputes cheap outputs and is decided when a graph is rewritten, this is decided call
by call, from the memory budget.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastlora.kernels.core import trace
from fastlora.kernels.core.semantic_op import SemanticOp


@dataclass
class NotSaved:
    """Counts the bytes that were not saved."""

    bytes: int = 0


class _Thread(threading.local):
    not_saved: NotSaved | None = None


current = _Thread()
"""This thread's state; `not_saved` is None unless `recomputing` is active."""


@contextmanager
def recomputing() -> Iterator[NotSaved]:
    """Have ops, in this thread, not save the residuals that their policy lists as recomputable."""
    before, current.not_saved = current.not_saved, NotSaved()
    try:
        yield current.not_saved
    finally:
        current.not_saved = before


def restore(op: SemanticOp, named: dict[str, Any], anchor: torch.Tensor) -> dict[str, Any]:
    """Recompute the residuals that were not saved from those that were; both are by name."""
    arguments = {name: named[name] for name in op.names}
    implementation = op.implementations.forward(anchor, arguments)
    trace.require_traceable(implementation.traceable)
    if implementation.restore is not None:
        return dict(zip(op.policy.recomputable, implementation.restore(**named), strict=True))
    results = dict(zip(op.result_names, implementation.forward(**arguments), strict=True))
    return {name: results[name] for name in op.policy.recomputable}
