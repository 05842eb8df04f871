"""The forms of an op, which are its implementations, and which of them runs.

Every op has a PyTorch form, which runs anywhere and in any dtype. `kernels/triton` adds Triton forms for NVIDIA GPUs,
and is imported when the first CUDA tensor meets an op. A form says for each call whether it serves the arguments at
hand, and the first that does runs; forward and backward are chosen apart, as all forms of an op keep the same
residuals.

Whatever the form, the results have the shapes, dtypes and strides of the PyTorch form's.
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
from torch._prims_common import is_contiguous_or_false

from fastlora.kernels.core.devices import runs_kernels


def _never(**_: Any) -> bool:
    return False


def _no_backward(**_: Any) -> dict[str, Any]:
    raise RuntimeError("no gradient flows into what a constant op is made of")


@dataclass(frozen=True)
class Form:
    """One implementation of an op.

    `forward` and `backward` take what the PyTorch form's take; that of a constant op has no backward. `serves` is asked
    with the arguments of the forward, `serves_backward` with those of the backward (`wanted`, `grads` and what was
    saved); both by name. `restore` takes what was saved, by name, and makes what the op spared of it.
    """

    name: str
    forward: Callable[..., tuple[Any, ...]]
    backward: Callable[..., dict[str, Any]] = _no_backward
    serves: Callable[..., bool] = _never
    serves_backward: Callable[..., bool] = _never
    restore: Callable[..., tuple[torch.Tensor, ...]] | None = None


def laid_out(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`t` with the strides that `empty_like` gives a tensor of its shape: a copy where it has others."""
    if t.is_contiguous() and like.is_contiguous():
        return t
    result = torch.empty_like(like, dtype=t.dtype)
    return t if result.stride() == t.stride() else result.copy_(t)


def contiguous(t: torch.Tensor) -> torch.Tensor:
    """`t.contiguous()` that asks nothing of sizes that are symbols: what is not known to be contiguous is copied."""
    return t if is_contiguous_or_false(t) else t.clone(memory_format=torch.contiguous_format)


@dataclass
class Forms:
    """The forms of one op: the PyTorch form, and before it, in order of preference, those for a GPU."""

    op: str
    pytorch: Form
    accelerated: list[Form] = field(default_factory=list)

    def forward(self, anchor: torch.Tensor, arguments: dict[str, Any]) -> Form:
        """The form to run a forward on; `anchor` is any of the tensors."""
        return self._first(anchor, arguments, "serves")

    def backward(self, anchor: torch.Tensor, arguments: dict[str, Any]) -> Form:
        return self._first(anchor, arguments, "serves_backward")

    def _first(self, anchor: torch.Tensor, arguments: dict[str, Any], question: str) -> Form:
        on_gpu = (anchor.is_cuda and runs_kernels(anchor.device)) or (anchor.is_meta and _thread.rehearses)
        if _only is None and not on_gpu:
            return self.pytorch
        if _only == self.pytorch.name:
            return self.pytorch
        _load()
        for form in self.accelerated:
            if _only in (None, form.name) and getattr(form, question)(**arguments):
                return form
        if _only is not None:
            raise NotImplementedError(f"{self.op}: the {_only} form does not serve these arguments")
        return self.pytorch


_only: str | None = None


@contextmanager
def only(name: str) -> Iterator[None]:
    """Runs every op on its form of that name, on any device, for tests and benchmarks.

    Raises:
        NotImplementedError: in a call that the form does not serve.
    """
    global _only
    before, _only = _only, name
    try:
        yield
    finally:
        _only = before


class _Thread(threading.local):
    rehearses = False


_thread = _Thread()


@contextmanager
def rehearsed() -> Iterator[None]:
    """In this thread, tensors without memory count as tensors on a GPU, for which forms are chosen."""
    before, _thread.rehearses = _thread.rehearses, True
    try:
        yield
    finally:
        _thread.rehearses = before


def restriction() -> str | None:
    """The name of the forms that `only` restricts ops to."""
    return _only


@cache
def _load() -> None:
    importlib.import_module("fastlora.kernels.triton")
