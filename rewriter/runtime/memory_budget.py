"""Running the regions of a model so that a forward keeps no more activations than a budget allows.

What a call of a region keeps is seen when it runs with hooks on saved tensors. As layers share a graph, and steps are
alike, it is known for all calls of a forward once the first has run, and `budget.choose` says what each is to do. Where
that is nothing, a region runs as it would without a budget.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from fastlora.compat.autograd import NO_BACKWARD, graph_task_id, saved_tensors_hooks, saved_tensors_hooks_disabled
from fastlora.compat.dispatch import is_wrapper_subclass
from fastlora.kernels.core.recompute import sparing
from fastlora.runtime.activation_offload import Mover
from fastlora.runtime.memory_planner import KEEP, LEAST, Choice, Needs, choose, left

PENDING = 128 << 20
"""Bytes that may be on their way to the host in any case: less would have the computation wait for each copy."""
MOST_KINDS = 4096
"""Shapes of inputs for which it is known what is kept; lengths that never come back are not to fill the memory."""
MOST_CALLS = 4096
"""Calls of a forward, at most; more were made outside of the model's, which nobody announces."""


class Thrift:
    """Decides, call by call, what regions keep, what they move to the host and what they make again.

    Args:
        budget: bytes of activations that one forward may keep on the device.
        mover: what moves them.
        note: is told what is left undone, and why.
    """

    def __init__(self, budget: int, mover: Mover, note: Callable[[str], None]) -> None:
        self._budget, self._mover, self._note = budget, mover, note
        self._needs: dict[Hashable, Needs] = {}
        self._latest: dict[Hashable, Hashable] = {}
        self._before: list[Hashable] = []
        self._now: list[Hashable] = []
        self._choices: list[Choice] = []
        self._kept = 0

    def begin(self) -> None:
        """Tells that a forward of the model starts."""
        if self._now:
            self._before, self._now, self._choices, self._kept = self._now, [], [], 0

    def summary(self) -> str | None:
        """What the calls of the last forward did, if that was anything."""
        moves, spares = (sum(getattr(choice, name) for choice in self._choices) for name in ("moves", "spares"))
        if not moves and not spares:
            return None
        return (
            f"for the memory budget, of {len(self._choices)} calls of regions in a forward {moves} moved what they "
            f"keep to the host, and {spares} are to make their widest activations again"
        )

    def run(
        self, graph: Hashable, run: Callable[..., Any], args: Sequence[Any], steady: frozenset[int] = frozenset()
    ) -> Any:
        """Runs a graph on its arguments: activations, plain values, and parameters and what else modules hold, which
        is in the positions `steady`."""
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        given = [
            arg
            for i, arg in enumerate(args)
            if isinstance(arg, torch.Tensor) and not isinstance(arg, nn.Parameter) and i not in steady
        ]
        if saved_tensors_hooks_disabled() is not None or saved_tensors_hooks(True) is not None:
            self._note(
                "memory_budget does nothing where saved tensors have hooks, as in gradient checkpointing, or may not"
            )
            return run(*args)
        leads_back = any(t.requires_grad for t in tensors)
        if not given or not leads_back or graph_task_id() != NO_BACKWARD:  # which runs on the way back
            return run(*args)
        kind = (graph, *(t.shape for t in given))
        largest = max(given, key=lambda t: t.nbytes)
        choice = self._choose(graph, kind, largest.device)
        self._kept += left(self._needs[kind], choice) if kind in self._needs else 0
        room = self._budget - self._kept
        self._mover.settle(max(PENDING, room))
        if choice == KEEP:
            results = run(*args)
            self._mover.return_before(results, room)
            return results
        held = [t for t in tensors if isinstance(t, nn.Parameter) or not t.requires_grad]
        saved: list[int] = []
        with ExitStack() as stack:
            spared = stack.enter_context(sparing()) if choice.spares else None
            stack.enter_context(self._mover.hooks(_addresses(held), saved.append, choice.moves, room))
            results = run(*args)
        if len(self._needs) >= MOST_KINDS:
            self._needs.clear()
        if kind not in self._needs and spared is not None:
            tokens = largest.numel() // largest.shape[-1] if largest.dim() else 1
            flops = 2 * tokens * sum(_elements(t) for t in held if t.dim() == 2)
            self._needs[kind] = Needs(sum(saved) + spared.bytes, spared.bytes, flops)
        return results

    def _choose(self, graph: Hashable, kind: Hashable, device: torch.device) -> Choice:
        if len(self._now) >= MOST_CALLS:
            self.begin()
        self._latest[graph] = kind
        at = len(self._now)
        self._now.append(graph)
        choice = LEAST
        if kind in self._needs and at < len(self._before):
            calls = [*self._now, *self._before[at + 1 :]]
            needs = (self._needs.get(self._latest[call], Needs(0)) for call in calls)
            choice = _chosen(tuple(needs), self._budget, self._mover.bytes_per_flop(device))[at]
        self._choices.append(choice)
        return choice


def _elements(weight: torch.Tensor) -> int:
    """Those of a matrix; one that is kept in 4 bits comes as a column, two elements to a byte."""
    return 2 * weight.nbytes if weight.shape[1] == 1 else weight.numel()


_chosen = lru_cache(maxsize=64)(choose)


def _addresses(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Where tensors lie, or what wrapper subclasses are made of."""
    found: set[int] = set()
    for t in tensors:
        if is_wrapper_subclass(t):
            names, _ = t.__tensor_flatten__()  # type: ignore[attr-defined]
            found |= _addresses(getattr(t, name) for name in names)
        else:
            found.add(t.untyped_storage().data_ptr())
    return found
