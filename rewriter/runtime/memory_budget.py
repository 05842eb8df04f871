"""Running the regions of a model within a budget of activations that a forward keeps on the device.

What a call of a region saves is measured once, by hooks on saved tensors. Layers share graphs and steps repeat, so
after the first forward it is known for all calls of a forward, and `memory_planner.plan` decides for each. A region
that offloads and recomputes nothing runs as without a budget.
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
from fastlora.kernels.core.recompute import recomputing
from fastlora.runtime.activation_offload import ActivationOffloader
from fastlora.runtime.memory_planner import KEEP, KEEP_LEAST, Activations, Decision, bytes_kept, plan

MAX_PENDING = 128 << 20
"""Bytes that may always be pending copies to the host; with fewer, the computation would wait for each copy."""
MAX_KEYS = 4096
"""Shapes of inputs whose measurements are kept at most, as sequence lengths may never repeat."""
MAX_CALLS = 4096
"""Calls in a forward at most; only regions that are called outside of the model's forward exceed this."""


class ActivationBudget:
    """Decides for each call of a region what it saves on the device, offloads and recomputes.

    Args:
        budget: bytes of activations that one forward may keep on the device.
        offloader: offloads activations.
        note: called with a sentence for the report if the budget has no effect.
    """

    def __init__(self, budget: int, offloader: ActivationOffloader, note: Callable[[str], None]) -> None:
        self._budget, self._offloader, self._note = budget, offloader, note
        self._measured: dict[Hashable, Activations] = {}
        self._latest_key: dict[Hashable, Hashable] = {}
        self._graphs_before: list[Hashable] = []
        self._graphs: list[Hashable] = []
        self._decisions: list[Decision] = []
        self._kept = 0

    def begin_forward(self) -> None:
        """Start counting the calls of a new forward of the model."""
        if self._graphs:
            self._graphs_before, self._graphs, self._decisions, self._kept = self._graphs, [], [], 0

    def summary(self) -> str | None:
        """Return a sentence on how many calls of the last forward offloaded or recomputed, None if no call did."""
        offload, recompute = (sum(getattr(d, name) for d in self._decisions) for name in ("offload", "recompute"))
        if not offload and not recompute:
            return None
        return (
            f"memory_budget: of {len(self._decisions)} calls of regions in a forward, {offload} offloaded their "
            f"activations to the host, and {recompute} recompute their widest activations in the backward"
        )

    def run(
        self, graph: Hashable, run: Callable[..., Any], args: Sequence[Any], static_inputs: frozenset[int] = frozenset()
    ) -> Any:
        """Run a graph.

        Args:
            graph: identifies the graph.
            run, args: the function to call, and its arguments: activations, plain values, parameters, buffers.
            static_inputs: the positions of arguments that are attributes of modules.
        """
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        activations = [
            arg
            for i, arg in enumerate(args)
            if isinstance(arg, torch.Tensor) and not isinstance(arg, nn.Parameter) and i not in static_inputs
        ]
        if saved_tensors_hooks_disabled() is not None or saved_tensors_hooks(True) is not None:
            self._note(
                "memory_budget has no effect where saved tensors have hooks, as in gradient checkpointing, or may not"
            )
            return run(*args)
        is_recomputation = graph_task_id() != NO_BACKWARD
        if not activations or is_recomputation or not any(t.requires_grad for t in tensors):
            return run(*args)
        key = (graph, *(t.shape for t in activations))
        largest = max(activations, key=lambda t: t.nbytes)
        decision = self._decide(graph, key, largest.device)
        self._kept += bytes_kept(self._measured[key], decision) if key in self._measured else 0
        headroom = self._budget - self._kept
        self._offloader.free_copied(max(MAX_PENDING, headroom))
        if decision == KEEP:
            results = run(*args)
            self._offloader.prefetch(results, headroom)
            return results
        leaves = [t for t in tensors if isinstance(t, nn.Parameter) or not t.requires_grad]
        saved: list[int] = []
        with ExitStack() as stack:
            recomputed = stack.enter_context(recomputing()) if decision.recompute else None
            stack.enter_context(self._offloader.hooks(_addresses(leaves), saved.append, decision.offload, headroom))
            results = run(*args)
        if len(self._measured) >= MAX_KEYS:
            self._measured.clear()
        if key not in self._measured and recomputed is not None:
            tokens = largest.numel() // largest.shape[-1] if largest.dim() else 1
            flops = 2 * tokens * sum(_elements(t) for t in leaves if t.dim() == 2)
            self._measured[key] = Activations(sum(saved) + recomputed.bytes, recomputed.bytes, flops)
        return results

    def _decide(self, graph: Hashable, key: Hashable, device: torch.device) -> Decision:
        if len(self._graphs) >= MAX_CALLS:
            self.begin_forward()
        self._latest_key[graph] = key
        index = len(self._graphs)
        self._graphs.append(graph)
        decision = KEEP_LEAST  # until all calls of a forward are measured
        if key in self._measured and index < len(self._graphs_before):
            calls = [*self._graphs, *self._graphs_before[index + 1 :]]
            expected = (self._measured.get(self._latest_key[call], Activations(0)) for call in calls)
            decision = _plan(tuple(expected), self._budget, self._offloader.bytes_per_flop(device))[index]
        self._decisions.append(decision)
        return decision


def _elements(weight: torch.Tensor) -> int:
    """Return the number of elements of a matrix; a 4-bit one is stored as a column of bytes with two elements each."""
    return 2 * weight.nbytes if weight.shape[1] == 1 else weight.numel()


_plan = lru_cache(maxsize=64)(plan)


def _addresses(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Return the addresses of the storages of tensors, and of the inner tensors of wrapper subclasses."""
    addresses: set[int] = set()
    for t in tensors:
        if is_wrapper_subclass(t):
            names, _ = t.__tensor_flatten__()  # type: ignore[attr-defined]
            addresses |= _addresses(getattr(t, name) for name in names)
        else:
            addresses.add(t.untyped_storage().data_ptr())
    return addresses
