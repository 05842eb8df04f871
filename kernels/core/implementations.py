"""The implementations of an op, and the selection among them.

Every op has a PyTorch implementation, which runs anywhere and in any dtype. `kernels/triton` adds those for NVIDIA
GPUs, and is imported when an op is first called with a CUDA tensor. The first implementation that supports the
arguments of a call runs. Forward and backward are selected independently, since all implementations save the same
residuals.

Results of all implementations have the shapes, dtypes and strides of the PyTorch implementation's.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from fastlora.compat.calls import is_contiguous_or_false
from fastlora.kernels.core.devices import runs_kernels


@dataclass(frozen=True)
class Implementation:
    """One implementation of an op.

    Attributes:
        name: `pytorch`, `triton`, ...
        forward, backward: take the same keyword arguments as those of the PyTorch implementation. backward is None for
            an op without one.
        serves: whether the forward supports these keyword arguments; None if it always does.
        serves_backward: the same for the backward, whose arguments are `wanted`, `grads` and what was saved.
        restore: takes what was saved, by keyword, and recomputes the residuals that were not saved.
        traceable: whether its calls of operators and kernels depend only on the layouts of tensors, not on their
            values, so that they can be recorded and replayed.
    """

    name: str
    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., dict[str, Any]] | None = None
    serves: Callable[..., bool] | None = None
    serves_backward: Callable[..., bool] | None = None
    restore: Callable[..., tuple[torch.Tensor, ...]] | None = None
    traceable: bool = False


@dataclass
class Implementations:
    """The implementations of one op: those for GPUs in order of preference, with the PyTorch one as the fallback."""

    op: str
    pytorch: Implementation
    accelerated: list[Implementation] = field(default_factory=list)

    def forward(self, anchor: torch.Tensor, arguments: dict[str, Any]) -> Implementation:
        """Return the implementation that runs a forward; `anchor` is any of its tensors."""
        for each in self._candidates(anchor):
            if each.serves is not None and each.serves(**arguments):
                return each
        return self._fallback()

    def backward(self, anchor: torch.Tensor, arguments: dict[str, Any]) -> Implementation:
        """Return the implementation that runs a backward; `anchor` is any of its tensors."""
        for each in self._candidates(anchor):
            if each.serves_backward is not None and each.serves_backward(**arguments):
                return each
        return self._fallback()

    def _candidates(self, anchor: torch.Tensor) -> list[Implementation]:
        on_gpu = (anchor.is_cuda and runs_kernels(anchor.device)) or (anchor.is_meta and _thread.precompiles)
        if (restricted.to is None and not on_gpu) or restricted.to == self.pytorch.name:
            return []
        _load()
        return [each for each in self.accelerated if restricted.to in (None, each.name)]

    def _fallback(self) -> Implementation:
        if restricted.to not in (None, self.pytorch.name):
            raise NotImplementedError(f"{self.op}: the {restricted.to} implementation does not serve these arguments")
        return self.pytorch


class _Restriction:
    to: str | None = None


restricted = _Restriction()
"""The name of the implementations that `only` restricts ops to, as `to`."""


@contextmanager
def only(name: str) -> Iterator[None]:
    """Run every op on its implementation of that name, on any device, for tests and benchmarks.

    Raises:
        NotImplementedError: in a call that the implementation does not support.
    """
    before, restricted.to = restricted.to, name
    try:
        yield
    finally:
        restricted.to = before


class _Thread(threading.local):
    precompiles = False


_thread = _Thread()


@contextmanager
def for_precompilation() -> Iterator[None]:
    """Select implementations for meta tensors, in this thread, as if they were on a GPU."""
    before, _thread.precompiles = _thread.precompiles, True
    try:
        yield
    finally:
        _thread.precompiles = before


@cache
def _load() -> None:
    importlib.import_module("fastlora.kernels.triton")


def with_strides_of(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return `t` with the strides of `empty_like(like)`, copied if it has others."""
    if t.is_contiguous() and like.is_contiguous():
        return t
    result = torch.empty_like(like, dtype=t.dtype)
    return t if result.stride() == t.stride() else result.copy_(t)


def contiguous(t: torch.Tensor) -> torch.Tensor:
    """Return `t.contiguous()` without guarding on symbolic sizes: `t` is copied unless it is known to be contiguous."""
    return t if is_contiguous_or_false(t) else t.clone(memory_format=torch.contiguous_format)
