"""Run a model, then put its state and all random states back to what they were."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@contextmanager
def untouched(model: nn.Module, *others: object) -> Iterator[None]:
    """Restore the model when the block ends or raises: what its modules and their configurations hold, what `others`
    hold, and the random states.

    This covers every attribute, and the entries of attributes that are dicts, lists or sets: parameters, buffers,
    hooks, training flags, compiled-call slots. A tensor is restored by identity only. If the block may write into one,
    put a stand-in in its place first.
    """
    kept = [(each, copy.copy(each)) for holder in (*holders(model), *others) for each in containers(holder)]
    states = _RandomStates.now()
    try:
        yield
    finally:
        for container, before in kept:
            _refill(container, before)
        states.restore()
        torch.clear_autocast_cache()  # an enclosing autocast region keeps casts of the stand-ins


def holders(model: nn.Module) -> list[Any]:
    """Return the modules of a model and their configurations, each once."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for holder in (module, getattr(module, "config", None)):
            if hasattr(holder, "__dict__"):
                found[id(holder)] = holder
    return list(found.values())


def containers(holder: object) -> Iterator[Any]:
    """Yield the attributes of an object as a dict, then each attribute that is a dict, a list or a set itself."""
    yield vars(holder)
    yield from (value for value in list(vars(holder).values()) if isinstance(value, (dict, list, set)))


def _refill(container: Any, before: Any) -> None:
    if _same(container, before):  # the usual case; a write would make compiled code check its guards again
        return
    container.clear()
    if isinstance(container, list):
        container.extend(before)
    else:
        container.update(before)


def _same(container: Any, before: Any) -> bool:
    if len(container) != len(before) or isinstance(container, set):
        return bool(container == before)
    if isinstance(container, list):
        return all(now is then for now, then in zip(container, before, strict=True))
    pairs = zip(container.items(), before.items(), strict=True)
    return all(key == its and value is then for (key, value), (its, then) in pairs)


@dataclass(frozen=True)
class _RandomStates:
    """The random states of PyTorch on the CPU and on GPUs, of Python, and of NumPy if it is imported."""

    cpu: torch.Tensor
    gpus: list[torch.Tensor]
    python: Any
    numpy: Any

    @classmethod
    def now(cls) -> _RandomStates:
        gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        numpy = sys.modules.get("numpy")
        return cls(torch.get_rng_state(), gpus, random.getstate(), numpy and numpy.random.get_state())

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpus:
            torch.cuda.set_rng_state_all(self.gpus)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
