"""Replaying a region's forward and backward as CUDA graphs, where launching kernels takes longer than running them.

A region that has run a few times on inputs of the same kind is recorded once, if the GPU was seen waiting for it: its
forward into one CUDA graph, its backward into another, on inputs that stay where they are. From then on a call copies
its activations there, replays, and copies the results out, so nothing that the caller holds is ever written to again.
Parameters are read where they lie: an optimizer changes them in place, and a parameter that has moved makes the inputs
another kind.

What a recording saves for its backward is its own memory, so a recording serves one forward at a time: until that one's
backward has run, or its results are gone, further calls (a second batch before the first one's backward, a layer used
twice) run as if there were none. So do calls that would overwrite what another recording has saved, and calls whose
saved tensors go through hooks, such as checkpointing's: these have to see the same tensors in every run.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastlora.compat.autograd import NO_BACKWARD, foreach_copy_, graph_task_id, saved_tensors_hooks
from fastlora.compat.dispatch import is_wrapper_subclass
from fastlora.errors import FastLoRAError
from fastlora.kernels.core.dispatch import is_last_backward
from fastlora.runtime.graph_pool import MOST_SHARE, Recorder
from fastlora.runtime.replay_choice import Pace

Runnable = Callable[..., Any]

RUNS_BEFORE = 2
"""Runs of a kind, forward and backward, before it is recorded: kernels are compiled, tuned and loaded in the first."""
MOST_KINDS = 4096
"""Kinds that are counted; where parameters move with every call, none comes back."""
MOST_RECORDINGS = 8
"""Recordings for the same parameters: each keeps memory of its own."""
LARGE = 16 << 20
"""Bytes of integers that are taken for weights, which nobody wants to copy in every call."""
MOST_COPIED = 256 << 20
"""Bytes of all that a call would copy: more than that are weights in disguise, or take longer than any launch."""


@dataclass
class Replays:
    """Runs a lowered graph, by replaying recordings where there are some.

    Args:
        run: the graph; its arguments are parameters, activations and plain values.
        recorder: what records.
        note: is told why something is not recorded.
        pace: tells whether recording pays; None to record in any case.
        steady: the positions of arguments that are read where they lie as parameters are, such as buffers.
    """

    run: Runnable
    recorder: Recorder
    note: Callable[[str], None]
    pace: Pace | None = None
    steady: frozenset[int] = frozenset()
    _recordings: dict[Hashable, _Recording | None] = field(default_factory=dict)
    _runs: Counter[Hashable] = field(default_factory=Counter)
    _at: Counter[Hashable] = field(default_factory=Counter)

    def __call__(self, *args: Any) -> Any:
        kind = self._kind(args)
        if kind is None:
            return self.run(*args)
        if kind in self._recordings:
            recording = self._recordings[kind]
            free = recording is not None and not recording.busy and self.recorder.is_free(recording)
            return recording(args) if recording is not None and free else self.run(*args)
        if self._runs[kind] < RUNS_BEFORE or graph_task_id() != NO_BACKWARD:
            return self._observed(kind, args)
        pays = self.pace is None or self.pace.pays(_shapes(args), self._copied(args))
        if pays is None:
            return self._observed(kind, args)
        if not pays:
            self._recordings[kind] = None
            return self.run(*args)
        try:
            self._recordings[kind] = self._record(args)
        except Exception as problem:  # whatever a graph does that cannot be recorded, it can be run
            self._decline(kind, f"{type(problem).__name__}: {problem}".partition("\n")[0])
            return self.run(*args)
        return self(*args)

    @property
    def recorded(self) -> int:
        """How many recordings there are: one for each kind of inputs, so at least one for each layer."""
        return sum(recording is not None for recording in self._recordings.values())

    def forget(self) -> None:
        """Drops all recordings, but for those whose backward is still to come."""
        for everything in (self._recordings, self._runs, self._at):
            everything.clear()

    def _record(self, args: Sequence[Any]) -> _Recording:
        if self._copied(args) > MOST_COPIED:
            raise FastLoRAError(f"its inputs, which a replay has to copy, take more than {MOST_COPIED >> 20} MiB")
        places = tuple(arg.data_ptr() for arg in args if isinstance(arg, nn.Parameter))
        self._at[places] += 1
        if self._at[places] > MOST_RECORDINGS:
            raise FastLoRAError(f"it is for {MOST_RECORDINGS} other shapes already")
        if self.recorder.full:
            raise FastLoRAError(f"recordings have taken {MOST_SHARE:.0%} of the device's memory")
        return _Recording(self.run, args, self.recorder, self.steady)

    def _observed(self, kind: Hashable, args: Sequence[Any]) -> Any:
        """A run that tells whether the graph can be recorded."""
        versions = [t._version for t in args if isinstance(t, torch.Tensor)]
        timed = None
        if self.pace is not None and self._runs[kind]:  # a first is slow
            timed = self.pace.time(_shapes(args), self._copied(args))
        results = self.run(*args)
        if timed is not None:
            timed.stop()
        live = [t for t in results if isinstance(t, torch.Tensor) and t.requires_grad]
        if not _apart(results, args):
            self._unfit(kind, "its results share memory with each other or with its inputs, or are no plain tensors")
        elif versions != [t._version for t in args if isinstance(t, torch.Tensor)]:
            self._unfit(kind, "it writes to its inputs")
        elif not any(isinstance(arg, torch.Tensor) and arg.requires_grad for arg in args):  # nothing trained leads here
            self._recordings[kind] = None
        elif len(live) != 1:  # of several, some may get no gradient, which is not the same as zeros
            self._unfit(kind, f"{len(live)} of its results have gradients, not one")
        else:
            self._runs[kind] += 0
            read = [arg for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and _stays(i, arg, self.steady)]
            state = _state(read)
            live[0].register_hook(lambda _: self._runs.update([kind] if _state(read) == state else []))
        return results

    def _unfit(self, kind: Hashable, reason: str) -> None:
        """Declines a kind of which nobody knows yet whether recording it would have paid."""
        if self.pace is None:
            self._decline(kind, reason)
        else:
            self._recordings[kind] = None

    def _decline(self, kind: Hashable, reason: str) -> None:
        self._recordings[kind] = None
        self.note(f"a region is not replayed as CUDA graphs: {reason}")

    def _copied(self, args: Sequence[Any]) -> int:
        """The bytes of what a replay has to copy."""
        return sum(args[i].nbytes for i in _activations(args, self.steady))

    def _kind(self, args: Sequence[Any]) -> Hashable | None:
        """What has to be equal for a recording to serve; None where none may."""
        if not torch.is_grad_enabled() or saved_tensors_hooks(True) is not None:
            return None
        place = self.recorder.place()
        if place is None:
            return None
        kind: list[Hashable] = [place]
        for i, arg in enumerate(args):
            if not isinstance(arg, torch.Tensor):
                if not isinstance(arg, (int, float, bool, str, type(None))):
                    return None
                kind += [type(arg).__name__, arg]
            elif arg.device != place or arg.is_inference() or is_wrapper_subclass(arg):
                return None
            elif _stays(i, arg, self.steady):
                kind += (arg.data_ptr(), arg.dtype, arg.requires_grad)
                kind += () if isinstance(arg, nn.Parameter) else (arg.shape, arg.stride())
            elif type(arg) is not torch.Tensor or (not arg.is_floating_point() and arg.nbytes > LARGE):
                return None
            else:
                kind += (arg.shape, arg.stride(), arg.dtype, arg.requires_grad)
        key = tuple(kind)
        known = key in self._runs or key in self._recordings
        return key if known or len(self._runs) + len(self._recordings) < MOST_KINDS else None


def _stays(i: int, arg: Any, steady: frozenset[int]) -> bool:
    """Whether the argument in position `i` is read where it lies."""
    return isinstance(arg, nn.Parameter) or (i in steady and not arg.requires_grad)


def _activations(args: Sequence[Any], steady: frozenset[int]) -> list[int]:
    """The positions of what a replay has to copy."""
    return [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and not _stays(i, arg, steady)]


def _shapes(args: Sequence[Any]) -> Hashable:
    """What calls have in common that take equally long: the layers of a model are as many kinds, but of one pace."""
    return tuple((arg.shape, arg.dtype) if isinstance(arg, torch.Tensor) else arg for arg in args)


def _apart(results: Sequence[Any], args: Sequence[Any]) -> bool:
    tensors = [t for t in results if isinstance(t, torch.Tensor)]
    if any(type(t) is not torch.Tensor for t in tensors):  # asking a deferred product for its memory would make it
        return False
    memories = [t.untyped_storage().data_ptr() for t in tensors]
    taken = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
    return len(set(memories)) == len(memories) and taken.isdisjoint(memories)


class _Recording:
    """A graph's forward and backward, recorded for one kind of inputs."""

    def __init__(self, run: Runnable, args: Sequence[Any], recorder: Recorder, steady: frozenset[int]) -> None:
        self._run, self._recorder, self.number = run, recorder, recorder.number()
        self._activations = _activations(args, steady)
        self._static = [_static(arg, i in self._activations) for i, arg in enumerate(args)]
        tensors = {i: arg for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)}
        self.read_in_place = [i for i in tensors if i not in self._activations]
        self._differentiable = [i for i, t in tensors.items() if t.requires_grad]
        self._results, self._forward = recorder.record(self._run_forward, transient=False)
        self._incoming = torch.empty_like(self._live)
        (self._outgoing, self._flat), self._backward = recorder.record(self._run_backward, transient=True)
        self._pending: weakref.ref[_Pass] | None = None

    @property
    def busy(self) -> bool:
        """Whether a forward's backward is still to come, for which memory has to stay as it is."""
        return self._pending is not None and self._pending() is not None

    def __call__(self, args: Sequence[Any]) -> Any:
        results = _Replay.apply(self, args, *(args[i] for i in self._differentiable))
        tensors = iter(results)
        return tuple(next(tensors) if isinstance(t, torch.Tensor) else t for t in self._results)

    def _run_forward(self) -> list[Any]:
        results = self._run(*self._static)
        tensors = [t for t in results if isinstance(t, torch.Tensor)]
        self.live_at = next(i for i, t in enumerate(tensors) if t.requires_grad)
        self._live = tensors[self.live_at]
        return [t.detach() if isinstance(t, torch.Tensor) else t for t in results]

    def _run_backward(self) -> tuple[list[torch.Tensor | None], dict[torch.dtype, torch.Tensor]]:
        """Gradients of activations, and those of parameters, which are many and small, as one tensor for each dtype."""
        inputs = [self._static[i] for i in self._differentiable]
        with torch.autocast(self._live.device.type, enabled=False):  # under which nobody calls a backward
            found = torch.autograd.grad(self._live, inputs, self._incoming, retain_graph=True, allow_unused=True)
        self._shapes = [None if g is None else (g.shape, g.dtype) for g in found]
        flat: dict[torch.dtype, list[torch.Tensor]] = {}
        for i, gradient in zip(self._differentiable, found, strict=True):
            if gradient is not None and i not in self._activations:
                flat.setdefault(gradient.dtype, []).append(gradient.reshape(-1))
        activations = [g if i in self._activations else None for i, g in zip(self._differentiable, found, strict=True)]
        return activations, {dtype: torch.cat(parts) for dtype, parts in flat.items()}

    def forward(self, args: Sequence[Any]) -> tuple[_Pass, list[torch.Tensor]]:
        if self._activations:
            with torch.no_grad():
                foreach_copy_([self._static[i] for i in self._activations], [args[i] for i in self._activations])
        self._forward()
        begun = _Pass()
        self._pending = weakref.ref(begun)
        self._recorder.begin(self)
        return begun, [t.clone() for t in self._results if isinstance(t, torch.Tensor)]

    def backward(self, begun: _Pass, gradient: torch.Tensor) -> list[torch.Tensor | None]:
        """The gradients of the differentiable arguments, in memory of their own."""
        if self._pending is None or self._pending() is not begun:
            raise RuntimeError(
                "backward through a region a second time, after what it saved was freed; "
                "use retain_graph=True in the first backward"
            )
        self._incoming.copy_(gradient)
        self._backward()
        parts = {dtype: flat.clone() for dtype, flat in self._flat.items()}
        taken = dict.fromkeys(parts, 0)
        results: list[torch.Tensor | None] = []
        for activation, shape in zip(self._outgoing, self._shapes, strict=True):
            if shape is None or activation is not None:
                results.append(None if activation is None else activation.clone())
                continue
            size, dtype = shape
            results.append(parts[dtype][taken[dtype] : taken[dtype] + size.numel()].view(size))
            taken[dtype] += size.numel()
        if is_last_backward():
            self._pending = None
        return results


class _Pass:
    """A forward whose backward may come: autograd's graph holds it as long as that is so."""


def _static(arg: Any, is_copied: bool) -> Any:
    """What a recording reads in place of an argument."""
    if not isinstance(arg, torch.Tensor):
        return arg
    if is_copied:
        return torch.empty_like(arg).copy_(arg.detach()).requires_grad_(arg.requires_grad)
    return arg.detach().requires_grad_() if arg.requires_grad else arg  # hooks of the parameter's own see one gradient


class _Replay(torch.autograd.Function):
    """Connects a recording's forward and backward."""

    @staticmethod
    def forward(ctx: Any, recording: _Recording, args: Sequence[Any], *differentiable: torch.Tensor) -> Any:
        ctx.recording = recording
        ctx.parameters = [args[i] for i in recording.read_in_place]
        ctx.read = _state(ctx.parameters)
        ctx.begun, results = recording.forward(args)
        ctx.mark_non_differentiable(*(t for i, t in enumerate(results) if i != recording.live_at))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a replayed region has no second derivative: backward cannot run under create_graph=True"
            )
        if _state(ctx.parameters) != ctx.read:
            raise RuntimeError(
                "a parameter of a replayed region was modified or moved between forward and backward; "
                "compile with mode='no-cudagraphs', which replays nothing"
            )
        return (None, None, *ctx.recording.backward(ctx.begun, grads[ctx.recording.live_at]))


def _state(parameters: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Where parameters lie, and how often they were written to."""
    return [(p.data_ptr(), p._version) for p in parameters]
