"""A region's forward and backward, captured as CUDA graphs for one kind of inputs, and how autograd calls them.

A capture reads its inputs at fixed addresses: parameters stay where they are, and activations are copied in. Its
results are copied out, so nothing that the caller holds is written to later. What the forward saves for the backward is
memory of the capture, so it serves one forward at a time: it is busy until that one's backward has run, or its results
are gone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fastlora.compat.autograd import foreach_copy_
from fastlora.kernels.core.dispatch import is_last_backward
from fastlora.runtime.graph_pool import Recorder

Runnable = Callable[..., Any]


class CapturedRegion:
    """A region's forward and backward, captured for one kind of inputs.

    Args:
        run, args: the region and the inputs that it is captured with.
        recorder: captures.
        held: the positions of inputs that modules hold.
    """

    def __init__(self, run: Runnable, args: Sequence[Any], recorder: Recorder, held: frozenset[int]) -> None:
        self._run, self._recorder, self.number = run, recorder, recorder.number()
        self._copied = copied_inputs(args, held)
        self._inputs = [_static(arg, i in self._copied) for i, arg in enumerate(args)]
        tensors = {i: arg for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)}
        self.read_in_place = [i for i in tensors if i not in self._copied]
        self._differentiable = [i for i, t in tensors.items() if t.requires_grad]
        self._results, self._replay_forward = recorder.record(self._run_forward, transient=False)
        self._incoming = torch.empty_like(self._differentiable_result)
        (self._outgoing, self._flat), self._replay_backward = recorder.record(self._run_backward, transient=True)
        self._pending: weakref.ref[Forward] | None = None

    @property
    def busy(self) -> bool:
        """Whether the backward of a forward may still come, for which the memory must stay as it is."""
        return self._pending is not None and self._pending() is not None

    def __call__(self, args: Sequence[Any]) -> Any:
        results = _Replay.apply(self, args, *(args[i] for i in self._differentiable))
        tensors = iter(results)
        return tuple(next(tensors) if isinstance(t, torch.Tensor) else t for t in self._results)

    def _run_forward(self) -> list[Any]:
        results = self._run(*self._inputs)
        tensors = [t for t in results if isinstance(t, torch.Tensor)]
        self.differentiable_at = next(i for i, t in enumerate(tensors) if t.requires_grad)
        self._differentiable_result = tensors[self.differentiable_at]
        return [t.detach() if isinstance(t, torch.Tensor) else t for t in results]

    def _run_backward(self) -> tuple[list[torch.Tensor | None], dict[torch.dtype, torch.Tensor]]:
        """Return the gradients of activations, and those of parameters, which are many and small, as one tensor for
        each dtype."""
        result = self._differentiable_result
        inputs = [self._inputs[i] for i in self._differentiable]
        with torch.autocast(result.device.type, enabled=False):  # a backward is not called under autocast
            found = torch.autograd.grad(result, inputs, self._incoming, retain_graph=True, allow_unused=True)
        self._shapes = [None if g is None else (g.shape, g.dtype) for g in found]
        flat: dict[torch.dtype, list[torch.Tensor]] = {}
        for i, gradient in zip(self._differentiable, found, strict=True):
            if gradient is not None and i not in self._copied:
                flat.setdefault(gradient.dtype, []).append(gradient.reshape(-1))
        activations = [g if i in self._copied else None for i, g in zip(self._differentiable, found, strict=True)]
        return activations, {dtype: torch.cat(parts) for dtype, parts in flat.items()}

    def forward(self, args: Sequence[Any]) -> tuple[Forward, list[torch.Tensor]]:
        if self._copied:
            with torch.no_grad():
                foreach_copy_([self._inputs[i] for i in self._copied], [args[i] for i in self._copied])
        self._replay_forward()
        started = Forward()
        self._pending = weakref.ref(started)
        self._recorder.begin(self)
        return started, [t.clone() for t in self._results if isinstance(t, torch.Tensor)]

    def backward(self, started: Forward, gradient: torch.Tensor) -> list[torch.Tensor | None]:
        """Return the gradients of the differentiable inputs, in memory of their own."""
        if self._pending is None or self._pending() is not started:
            raise RuntimeError(
                "backward through a region a second time, after what it saved was freed; "
                "use retain_graph=True in the first backward"
            )
        self._incoming.copy_(gradient)
        self._replay_backward()
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


class Forward:
    """A forward whose backward may still come: autograd's graph holds it as long as that is so."""


class _Replay(torch.autograd.Function):
    """Connects the forward and the backward of a capture."""

    @staticmethod
    def forward(ctx: Any, region: CapturedRegion, args: Sequence[Any], *differentiable: torch.Tensor) -> Any:
        ctx.region = region
        ctx.read = [args[i] for i in region.read_in_place]
        ctx.state = state_of(ctx.read)
        ctx.started, results = region.forward(args)
        ctx.mark_non_differentiable(*(t for i, t in enumerate(results) if i != region.differentiable_at))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a replayed region has no second derivative: backward cannot run under create_graph=True"
            )
        if state_of(ctx.read) != ctx.state:
            raise RuntimeError(
                "a parameter of a replayed region was modified or moved between forward and backward; "
                "compile with mode='no-cudagraphs', which replays nothing"
            )
        return (None, None, *ctx.region.backward(ctx.started, grads[ctx.region.differentiable_at]))


def is_read_in_place(i: int, arg: Any, held: frozenset[int]) -> bool:
    """Whether a capture reads the input in position `i` where it lies."""
    return isinstance(arg, nn.Parameter) or (i in held and not arg.requires_grad)


def copied_inputs(args: Sequence[Any], held: frozenset[int]) -> list[int]:
    """Return the positions of the inputs that a replay copies."""
    return [i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and not is_read_in_place(i, arg, held)]


def state_of(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Return where tensors lie, and how often they were written to."""
    return [(t.data_ptr(), t._version) for t in tensors]


def _static(arg: Any, is_copied: bool) -> Any:
    """Return what a capture reads in place of an input."""
    if not isinstance(arg, torch.Tensor):
        return arg
    if is_copied:
        return torch.empty_like(arg).copy_(arg.detach()).requires_grad_(arg.requires_grad)
    return arg.detach().requires_grad_() if arg.requires_grad else arg  # a parameter's own hooks see one gradient
