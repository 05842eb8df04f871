"""Not saving what the backward can make again at a price: the widest activations, for one or two products of a layer.

Unlike outputs that a graph is rewritten to recompute (`DerivedArgument`), which cost next to nothing, this is decided
call by call, by how much memory is asked for.
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
    """What was not saved so far."""

    bytes: int = 0


class _Thread(threading.local):
    not_saved: NotSaved | None = None


current = _Thread()
"""This thread's state; `not_saved` is None where ops save what they can."""


@contextmanager
def recomputing() -> Iterator[NotSaved]:
    """Have ops, in this thread, save nothing that their policy calls recomputable."""
    before, current.not_saved = current.not_saved, NotSaved()
    try:
        yield current.not_saved
    finally:
        current.not_saved = before


def restore(op: SemanticOp, named: dict[str, Any], anchor: torch.Tensor) -> dict[str, Any]:
    """Return the residuals that were not saved, from what was, by name."""
    arguments = {name: named[name] for name in op.names}
    implementation = op.implementations.forward(anchor, arguments)
    trace.insist_on(implementation.traceable)
    if implementation.restore is not None:
        return dict(zip(op.policy.recomputable, implementation.restore(**named), strict=True))
    results = dict(zip(op.result_names, implementation.forward(**arguments), strict=True))
    return {name: results[name] for name in op.policy.recomputable}
