"""Replaying a region's forward and backward as CUDA graphs, where launching kernels takes longer than running them.

A region that has run a few times on inputs of the same kind is captured once, if the GPU was seen waiting for launches:
its forward as one CUDA graph, its backward as another. From then on a call copies its activations in, replays, and
copies the results out. Parameters are read where they are: an optimizer changes them in place, and a parameter that has
moved makes the inputs another kind.

A call runs without CUDA graphs as long as the capture is busy with another forward (a second batch before the backward
of the first, a layer that is used twice), where a replay would overwrite what another capture has saved, and where
saved tensors go through hooks, as in checkpointing: hooks have to see the same tensors in every run.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastlora.compat.autograd import NO_BACKWARD, graph_task_id, saved_tensors_hooks
from fastlora.compat.dispatch import is_wrapper_subclass
from fastlora.errors import FastLoRAError
from fastlora.runtime.captured_region import CapturedRegion, Runnable, copied_inputs, is_read_in_place, state_of
from fastlora.runtime.graph_pool import MAX_SHARE, Recorder
from fastlora.runtime.replay_choice import ReplayTimer

_log = logging.getLogger(__name__)

RUNS_BEFORE = 2
"""Runs of a kind, forward and backward, before it is captured: the first compiles, tunes and loads kernels."""
MAX_KEYS = 4096
"""Kinds that are counted: where parameters move with every call, none repeats."""
MAX_CAPTURES = 8
"""Captures for the same parameters: each has memory of its own."""
MAX_INTEGERS = 16 << 20
"""Larger integer tensors are taken for quantized weights, which are not copied in every call."""
MAX_COPIED = 256 << 20
"""Bytes that a call may copy: more than that are weights, or take longer than launches do."""


@dataclass
class GraphReplayer:
    """Runs a lowered graph, by replaying CUDA graphs where it can.

    Args:
        run: the graph; its arguments are parameters, activations and plain values.
        recorder: captures.
        note: called with a sentence for the report if the graph cannot be captured.
        timer: decides whether replaying pays; None to replay in any case.
        held: the positions of arguments that modules hold, such as buffers, which are read where they lie.
        name: of the region, for the log.
    """

    run: Runnable
    recorder: Recorder
    note: Callable[[str], None]
    timer: ReplayTimer | None = None
    held: frozenset[int] = frozenset()
    name: str = "a region"
    _captures: dict[Hashable, CapturedRegion | None] = field(default_factory=dict)
    _runs: Counter[Hashable] = field(default_factory=Counter)
    _captures_of: Counter[Hashable] = field(default_factory=Counter)

    def __call__(self, *args: Any) -> Any:
        key = self._key(args)
        if key is None:
            return self.run(*args)
        if key in self._captures:
            captured = self._captures[key]
            is_free = captured is not None and not captured.busy and self.recorder.is_free(captured)
            return captured(args) if captured is not None and is_free else self.run(*args)
        if self._runs[key] < RUNS_BEFORE or graph_task_id() != NO_BACKWARD:
            return self._run_observed(key, args)
        pays = self.timer is None or self.timer.replay_pays(_shapes(args), self._bytes_copied(args))
        if pays is None:
            return self._run_observed(key, args)
        if not pays:
            _log.debug("%s: CUDA graphs would save no time", self.name)
            self._captures[key] = None
            return self.run(*args)
        try:
            self._captures[key] = self._capture(args)
        except Exception as problem:  # a graph that cannot be captured can still be run
            self._decline(key, f"{type(problem).__name__}: {problem}".partition("\n")[0])
            return self.run(*args)
        _log.info("%s: captured as CUDA graphs, which are replayed from now on", self.name)
        return self(*args)

    @property
    def captured(self) -> int:
        """Return the number of captures: one for each kind of inputs, so at least one for each layer."""
        return sum(captured is not None for captured in self._captures.values())

    def forget(self) -> None:
        """Drop all captures, except those whose backward may still come."""
        for everything in (self._captures, self._runs, self._captures_of):
            everything.clear()

    def _capture(self, args: Sequence[Any]) -> CapturedRegion:
        if self._bytes_copied(args) > MAX_COPIED:
            raise FastLoRAError(f"a replay would copy more than {MAX_COPIED >> 20} MiB of inputs")
        addresses = tuple(arg.data_ptr() for arg in args if isinstance(arg, nn.Parameter))
        self._captures_of[addresses] += 1
        if self._captures_of[addresses] > MAX_CAPTURES:
            raise FastLoRAError(f"it is captured for {MAX_CAPTURES} other shapes already")
        if self.recorder.full:
            raise FastLoRAError(f"CUDA graphs have taken {MAX_SHARE:.0%} of the device's memory")
        return CapturedRegion(self.run, args, self.recorder, self.held)

    def _run_observed(self, key: Hashable, args: Sequence[Any]) -> Any:
        """Run the graph, and see whether it can be captured."""
        versions = [t._version for t in args if isinstance(t, torch.Tensor)]
        timed = None
        if self.timer is not None and self._runs[key]:  # the first run is slow
            timed = self.timer.time(_shapes(args), self._bytes_copied(args))
        results = self.run(*args)
        if timed is not None:
            timed.stop()
        differentiable = [t for t in results if isinstance(t, torch.Tensor) and t.requires_grad]
        if not _have_own_memory(results, args):
            self._reject(key, "its results share memory with each other or with its inputs, or are not plain tensors")
        elif versions != [t._version for t in args if isinstance(t, torch.Tensor)]:
            self._reject(key, "it writes to its inputs")
        elif not any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            self._captures[key] = None  # it has no backward
        elif len(differentiable) != 1:  # some of several may get no gradient, which is not the same as zeros
            self._reject(key, f"{len(differentiable)} of its results have gradients, not one")
        else:
            self._runs[key] += 0
            read = [a for i, a in enumerate(args) if isinstance(a, torch.Tensor) and is_read_in_place(i, a, self.held)]
            state = state_of(read)
            differentiable[0].register_hook(lambda _: self._runs.update([key] if state_of(read) == state else []))
        return results

    def _reject(self, key: Hashable, reason: str) -> None:
        """Do not capture a kind of inputs; the reason is reported only where replaying was asked for."""
        if self.timer is None:
            self._decline(key, reason)
        else:
            _log.debug("%s: not captured as CUDA graphs: %s", self.name, reason)
            self._captures[key] = None

    def _decline(self, key: Hashable, reason: str) -> None:
        _log.info("%s: not captured as CUDA graphs: %s", self.name, reason)
        self._captures[key] = None
        self.note(f"a region is not captured as CUDA graphs: {reason}")

    def _bytes_copied(self, args: Sequence[Any]) -> int:
        """Return the bytes that a replay copies."""
        return sum(args[i].nbytes for i in copied_inputs(args, self.held))

    def _key(self, args: Sequence[Any]) -> Hashable | None:
        """Return what has to be equal for a capture to serve a call; None where none may."""
        if not torch.is_grad_enabled() or saved_tensors_hooks(True) is not None:
            return None
        place = self.recorder.place()
        if place is None:
            return None
        parts: list[Hashable] = [place]
        for i, arg in enumerate(args):
            if not isinstance(arg, torch.Tensor):
                if not isinstance(arg, (int, float, bool, str, type(None))):
                    return None
                parts += [type(arg).__name__, arg]
            elif arg.device != place or arg.is_inference() or is_wrapper_subclass(arg):
                return None
            elif is_read_in_place(i, arg, self.held):
                parts += (arg.data_ptr(), arg.dtype, arg.requires_grad)
                parts += () if isinstance(arg, nn.Parameter) else (arg.shape, arg.stride())
            elif type(arg) is not torch.Tensor or (not arg.is_floating_point() and arg.nbytes > MAX_INTEGERS):
                return None
            else:
                parts += (arg.shape, arg.stride(), arg.dtype, arg.requires_grad)
        key = tuple(parts)
        known = key in self._runs or key in self._captures
        return key if known or len(self._runs) + len(self._captures) < MAX_KEYS else None


def _shapes(args: Sequence[Any]) -> Hashable:
    """Return what calls that take equally long have in common: the layers of a model differ in keys, not in time."""
    return tuple((arg.shape, arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in args)


def _have_own_memory(results: Sequence[Any], args: Sequence[Any]) -> bool:
    tensors = [t for t in results if isinstance(t, torch.Tensor)]
    if any(type(t) is not torch.Tensor for t in tensors):  # asking deferred logits for their memory computes them
        return False
    memories = [t.untyped_storage().data_ptr() for t in tensors]
    taken = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
    return len(set(memories)) == len(memories) and taken.isdisjoint(memories)
