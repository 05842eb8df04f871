"""Not keeping what the backward can make again at a price: the widest activations, for one or two products of a layer.

Unlike what a graph is rewritten to make again (`apply.Made`), which costs next to nothing, this is decided call by
call: as much is spared as the memory at hand asks for.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fastlora.kernels.core import dispatch

if TYPE_CHECKING:
    from fastlora.kernels.core.semantic_op import SemanticOp


@dataclass
class Spared:
    """What was not kept so far."""

    bytes: int = 0


class _Thread(threading.local):
    spared: Spared | None = None


_thread = _Thread()


@contextmanager
def sparing() -> Iterator[Spared]:
    """In this thread, ops keep nothing of what they can spare."""
    before, _thread.spared = _thread.spared, Spared()
    try:
        yield _thread.spared
    finally:
        _thread.spared = before


def spare(op: SemanticOp, saved: list[Any]) -> bool:
    """Takes what an op can spare out of what it saves, if it is asked to; False if it is nothing, or if what it is made
    of is missing."""
    if _thread.spared is None or not op.spares:
        return False
    if any(a.name in op.saved_if and saved[i] is None for i, a in enumerate(op.saved)):
        return False
    for i in _spared(op):
        _thread.spared.bytes += saved[i].nbytes
        saved[i] = None
    return True


def restore(op: SemanticOp, saved: list[Any], constants: Sequence[Any]) -> None:
    """Puts what was spared back."""
    named = dict(zip(op.backward_names, (*saved, *constants), strict=True))
    arguments = {name: named[name] for name in op.names}
    values = list(arguments.values())
    tensors = [t for t in op.leaves.flat(values) if isinstance(t, torch.Tensor)]  # of encoded ones there are stand-ins
    anchor = tensors[0]
    form = op.forms.forward(anchor, arguments)
    if form.restore is not None and dispatch.unheard(tensors):
        made = dispatch.run(f"{op.name}_restore", form.restore, anchor, named)
    else:
        results = dict(zip(op.result_names, op.below_autograd(tensors, values), strict=True))
        made = tuple(results[name] for name in op.spares)
    for i, value in zip(_spared(op), made, strict=True):
        saved[i] = value


def _spared(op: SemanticOp) -> list[int]:
    names = [a.name for a in op.saved]
    return [names.index(name) for name in op.spares]
