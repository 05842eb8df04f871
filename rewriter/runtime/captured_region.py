"""A region's forward and backward, captured as CUDA graphs, and the autograd function that replays them.

A capture reads its inputs at fixed addresses: parameters are read in place, and activations are copied in. Its results
are copied out, so nothing that the caller holds is written to later. The memory of the capture holds what the forward
saves for the backward, so it serves one forward at a time, until the backward has run or the results are deleted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from fastlora.compat.autograd import foreach_copy_
from fastlora.kernels.core.dispatch import is_last_backward
from fastlora.runtime.graph_pool import GraphRecorder

Runnable = Callable[..., Any]


class CapturedRegion:
    """A region's forward and backward, captured for inputs like `args`.

    Args:
        run, args: the region and the inputs that it is captured with.
        recorder: captures functions.
        static_inputs: the positions of inputs that are attributes of modules.
    """

    def __init__(
        self, run: Runnable, args: Sequence[Any], recorder: GraphRecorder, static_inputs: frozenset[int]
    ) -> None:
        self._run, self._recorder, self.number = run, recorder, recorder.next_number()
        self._copied = copied_inputs(args, static_inputs)
        self._inputs = [_captured_input(arg, i in self._copied) for i, arg in enumerate(args)]
        tensors = {i: arg for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)}
        self.read_in_place = [i for i in tensors if i not in self._copied]
        self._differentiable = [i for i, t in tensors.items() if t.requires_grad]
        self._results, self._replay_forward = recorder.capture(self._run_forward, transient=False)
        self._grad_output = torch.empty_like(self._differentiable_result)
        grads, self._replay_backward = recorder.capture(self._run_backward, transient=True)
        self._activation_grads, self._flat_grads = grads
        self._pending: weakref.ref[ForwardToken] | None = None

    @property
    def awaits_backward(self) -> bool:
        """Whether the backward of a forward may still run, until which the memory must not change."""
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
        """Return the gradients of activations, and those of parameters, which are many and small, concatenated to one
        tensor for each dtype."""
        result = self._differentiable_result
        inputs = [self._inputs[i] for i in self._differentiable]
        with torch.autocast(result.device.type, enabled=False):  # a backward is not called under autocast
            grads = torch.autograd.grad(result, inputs, self._grad_output, retain_graph=True, allow_unused=True)
        self._shapes = [None if g is None else (g.shape, g.dtype) for g in grads]
        flat: dict[torch.dtype, list[torch.Tensor]] = {}
        for i, grad in zip(self._differentiable, grads, strict=True):
            if grad is not None and i not in self._copied:
                flat.setdefault(grad.dtype, []).append(grad.reshape(-1))
        activations = [g if i in self._copied else None for i, g in zip(self._differentiable, grads, strict=True)]
        return activations, {dtype: torch.cat(parts) for dtype, parts in flat.items()}

    def forward(self, args: Sequence[Any]) -> tuple[ForwardToken, list[torch.Tensor]]:
        """Replay the forward; return a token that the backward takes, and copies of the results."""
        if self._copied:
            with torch.no_grad():
                foreach_copy_([self._inputs[i] for i in self._copied], [args[i] for i in self._copied])
        self._replay_forward()
        token = ForwardToken()
        self._pending = weakref.ref(token)
        self._recorder.mark_replayed(self)
        return token, [t.clone() for t in self._results if isinstance(t, torch.Tensor)]

    def backward(self, token: ForwardToken, grad_output: torch.Tensor) -> list[torch.Tensor | None]:
        """Replay the backward; return copies of the gradients of the differentiable inputs.

        Raises:
            RuntimeError: if the backward of this forward has already run.
        """
        if self._pending is None or self._pending() is not token:
            raise RuntimeError(
                "backward through a region a second time, after what it saved was freed; "
                "use retain_graph=True in the first backward"
            )
        self._grad_output.copy_(grad_output)
        self._replay_backward()
        flat = {dtype: t.clone() for dtype, t in self._flat_grads.items()}
        offsets = dict.fromkeys(flat, 0)
        grads: list[torch.Tensor | None] = []
        for activation, shape_and_dtype in zip(self._activation_grads, self._shapes, strict=True):
            if shape_and_dtype is None or activation is not None:
                grads.append(None if activation is None else activation.clone())
                continue
            shape, dtype = shape_and_dtype
            grads.append(flat[dtype][offsets[dtype] : offsets[dtype] + shape.numel()].view(shape))
            offsets[dtype] += shape.numel()
        if is_last_backward():
            self._pending = None
        return grads


class ForwardToken:
    """Stands for a replayed forward; autograd's graph keeps it alive as long as the backward may run."""


class _Replay(torch.autograd.Function):
    """Replays the forward and the backward of a capture."""

    @staticmethod
    def forward(ctx: Any, region: CapturedRegion, args: Sequence[Any], *differentiable: torch.Tensor) -> Any:
        ctx.region = region
        ctx.read_in_place = [args[i] for i in region.read_in_place]
        ctx.state = state_of(ctx.read_in_place)
        ctx.token, results = region.forward(args)
        ctx.mark_non_differentiable(*(t for i, t in enumerate(results) if i != region.differentiable_at))
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a replayed region has no second derivative: backward cannot run under create_graph=True"
            )
        if state_of(ctx.read_in_place) != ctx.state:
            raise RuntimeError(
                "a parameter of a replayed region was modified or moved between forward and backward; "
                "compile with mode='no-cudagraphs', which replays nothing"
            )
        return (None, None, *ctx.region.backward(ctx.token, grads[ctx.region.differentiable_at]))


def is_read_in_place(i: int, arg: Any, static_inputs: frozenset[int]) -> bool:
    """Return whether a capture reads input `i` in place."""
    return isinstance(arg, nn.Parameter) or (i in static_inputs and not arg.requires_grad)


def copied_inputs(args: Sequence[Any], static_inputs: frozenset[int]) -> list[int]:
    """Return the positions of the inputs that are copied before each replay."""
    return [
        i for i, arg in enumerate(args) if isinstance(arg, torch.Tensor) and not is_read_in_place(i, arg, static_inputs)
    ]


def state_of(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """Return the addresses and versions of tensors."""
    return [(t.data_ptr(), t._version) for t in tensors]


def _captured_input(arg: Any, is_copied: bool) -> Any:
    """Return the tensor that a capture reads in place of an input."""
    if not isinstance(arg, torch.Tensor):
        return arg
    if is_copied:
        return torch.empty_like(arg).copy_(arg.detach()).requires_grad_(arg.requires_grad)
    return arg.detach().requires_grad_() if arg.requires_grad else arg  # detached: hooks of parameters must run once
