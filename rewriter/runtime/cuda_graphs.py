"""Replaying a region's forward and backward as CUDA graphs, where launching kernels takes longer than running them.

A region that has run a few times with the same input key (shapes, dtypes, addresses of parameters) is captured, if the
GPU was seen waiting for launches: its forward as one CUDA graph, its backward as another. From then on a call copies
its activations in, replays, and copies the results out. Parameters are read in place, as an optimizer updates them in
place; a parameter that has moved changes the key.

A call runs without CUDA graphs while the capture waits for the backward of another forward (a second batch before the
backward of the first, a layer that is used twice), if a replay would overwrite what another capture has saved, and if
saved tensors have hooks, as in checkpointing: hooks must see the same tensors in every run.
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
from fastlora.runtime.graph_pool import MAX_SHARE, GraphRecorder
from fastlora.runtime.replay_choice import ReplayTimer

_log = logging.getLogger(__name__)

RUNS_BEFORE = 2
"""Runs with a key, forward and backward, before it is captured: the first compiles, tunes and loads kernels."""
MAX_KEYS = 4096
"""Keys that are counted at most: if parameters move with every call, no key repeats."""
MAX_CAPTURES = 8
"""Captures for the same parameters at most, as each takes memory."""
MAX_INTEGERS = 16 << 20
"""Integer tensors of more bytes are assumed to be quantized weights, and are not copied in every call."""
MAX_COPIED = 256 << 20
"""Bytes that a call may copy. Copies of more, such as weights, take longer than launches do."""


@dataclass
class GraphReplayer:
    """Runs a lowered graph, by replaying CUDA graphs where it can.

    Args:
        run: the graph; its arguments are parameters, activations and plain values.
        recorder: captures functions.
        note: called with a sentence for the report if the graph cannot be captured.
        timer: decides whether replaying saves time; None to replay in any case.
        static_inputs: the positions of arguments that are attributes of modules, such as buffers, which are read in
            place.
        name: the name of the region, for the log.
    """

    run: Runnable
    recorder: GraphRecorder
    note: Callable[[str], None]
    timer: ReplayTimer | None = None
    static_inputs: frozenset[int] = frozenset()
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
            if captured is None or captured.awaits_backward or not self.recorder.can_replay(captured):
                return self.run(*args)
            return captured(args)
        if self._runs[key] < RUNS_BEFORE or graph_task_id() != NO_BACKWARD:
            return self._run_and_inspect(key, args)
        saves_time = self.timer is None or self.timer.replay_saves_time(_shapes(args), self._bytes_copied(args))
        if saves_time is None:
            return self._run_and_inspect(key, args)
        if not saves_time:
            _log.debug("%s: CUDA graphs would save no time", self.name)
            self._captures[key] = None
            return self.run(*args)
        try:
            self._captures[key] = self._capture(args)
        except Exception as problem:  # a graph that cannot be captured can still be run
            self._refuse_and_note(key, f"{type(problem).__name__}: {problem}".partition("\n")[0])
            return self.run(*args)
        _log.info("%s: captured as CUDA graphs, which are replayed from now on", self.name)
        return self(*args)

    @property
    def captured(self) -> int:
        """Return the number of captures: one for each key, so at least one for each layer."""
        return sum(captured is not None for captured in self._captures.values())

    def clear(self) -> None:
        """Drop all captures; autograd keeps those whose backward may still run."""
        for each in (self._captures, self._runs, self._captures_of):
            each.clear()

    def _capture(self, args: Sequence[Any]) -> CapturedRegion:
        if self._bytes_copied(args) > MAX_COPIED:
            raise FastLoRAError(f"a replay would copy more than {MAX_COPIED >> 20} MiB of inputs")
        addresses = tuple(arg.data_ptr() for arg in args if isinstance(arg, nn.Parameter))
        self._captures_of[addresses] += 1
        if self._captures_of[addresses] > MAX_CAPTURES:
            raise FastLoRAError(f"it is captured for {MAX_CAPTURES} other shapes already")
        if self.recorder.is_full:
            raise FastLoRAError(f"CUDA graphs have taken {MAX_SHARE:.0%} of the device's memory")
        return CapturedRegion(self.run, args, self.recorder, self.static_inputs)

    def _run_and_inspect(self, key: Hashable, args: Sequence[Any]) -> Any:
        """Run the graph, count and time the run, and decide whether the graph can be captured."""
        versions = [t._version for t in args if isinstance(t, torch.Tensor)]
        stopwatch = None
        if self.timer is not None and self._runs[key]:  # the first run is slow
            stopwatch = self.timer.start(_shapes(args), self._bytes_copied(args))
        results = self.run(*args)
        if stopwatch is not None:
            stopwatch.stop()
        differentiable = [t for t in results if isinstance(t, torch.Tensor) and t.requires_grad]
        if not _have_own_memory(results, args):
            self._refuse(key, "its results share memory with each other or with its inputs, or are not plain tensors")
        elif versions != [t._version for t in args if isinstance(t, torch.Tensor)]:
            self._refuse(key, "it writes to its inputs")
        elif not any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):
            self._captures[key] = None  # it has no backward
        elif len(differentiable) != 1:  # some of several may get no gradient, which is not the same as zeros
            self._refuse(key, f"{len(differentiable)} of its results have gradients, not one")
        else:
            self._count_backward(key, differentiable[0], args)
        return results

    def _count_backward(self, key: Hashable, result: torch.Tensor, args: Sequence[Any]) -> None:
        """Count the run once the backward of `result` starts, unless an input that is read in place has changed."""
        self._runs[key] += 0
        tensors = ((i, arg) for i, arg in enumerate(args) if isinstance(arg, torch.Tensor))
        in_place = [t for i, t in tensors if is_read_in_place(i, t, self.static_inputs)]
        state = state_of(in_place)
        result.register_hook(lambda _: self._runs.update([key] if state_of(in_place) == state else []))

    def _refuse(self, key: Hashable, reason: str) -> None:
        """Do not capture inputs with this key; report the reason only if the user has requested replays."""
        if self.timer is None:
            self._refuse_and_note(key, reason)
        else:
            _log.debug("%s: not captured as CUDA graphs: %s", self.name, reason)
            self._captures[key] = None

    def _refuse_and_note(self, key: Hashable, reason: str) -> None:
        _log.info("%s: not captured as CUDA graphs: %s", self.name, reason)
        self._captures[key] = None
        self.note(f"a region is not captured as CUDA graphs: {reason}")

    def _bytes_copied(self, args: Sequence[Any]) -> int:
        """Return the bytes that a replay copies."""
        return sum(args[i].nbytes for i in copied_inputs(args, self.static_inputs))

    def _key(self, args: Sequence[Any]) -> Hashable | None:
        """Return what must be equal for a capture to serve a call, None if no capture can."""
        if not torch.is_grad_enabled() or saved_tensors_hooks(True) is not None:
            return None
        device = self.recorder.capture_device()
        if device is None:
            return None
        parts: list[Hashable] = [device]
        for i, arg in enumerate(args):
            if not isinstance(arg, torch.Tensor):
                if not isinstance(arg, (int, float, bool, str, type(None))):
                    return None
                parts += [type(arg).__name__, arg]
            elif arg.device != device or arg.is_inference() or is_wrapper_subclass(arg):
                return None
            elif is_read_in_place(i, arg, self.static_inputs):
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
    """Return the key under which calls are timed: the layers of a model have different keys, but take equally long."""
    return tuple((arg.shape, arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in args)


def _have_own_memory(results: Sequence[Any], args: Sequence[Any]) -> bool:
    tensors = [t for t in results if isinstance(t, torch.Tensor)]
    if any(type(t) is not torch.Tensor for t in tensors):  # reading the storage of deferred logits would compute them
        return False
    storages = [t.untyped_storage().data_ptr() for t in tensors]
    input_storages = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
    return len(set(storages)) == len(storages) and input_storages.isdisjoint(storages)
