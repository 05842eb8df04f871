"""Running a model and restoring its state and all random states afterwards."""

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
def preserve_state(model: nn.Module, *others: object) -> Iterator[None]:
    """Restore a model when the block ends or raises: the attributes of its modules, of their configurations and of
    `others`, and the random states.

    This covers every attribute, and the entries of attributes that are dicts, lists or sets: parameters, buffers,
    hooks, training flags, compiled-call slots. Tensors are restored by identity only: if the block may write to one,
    replace it by a copy first.
    """
    saved = [(each, copy.copy(each)) for owner in (*modules_and_configs(model), *others) for each in containers(owner)]
    states = _RandomStates.current()
    try:
        yield
    finally:
        for container, before in saved:
            _restore(container, before)
        states.restore()
        torch.clear_autocast_cache()  # an enclosing autocast region has cached casts of replaced tensors


def modules_and_configs(model: nn.Module) -> list[Any]:
    """Return the modules of a model and their configurations, each once."""
    found: dict[int, Any] = {}
    for module in model.modules():
        for each in (module, getattr(module, "config", None)):
            if hasattr(each, "__dict__"):
                found[id(each)] = each
    return list(found.values())


def containers(owner: object) -> Iterator[Any]:
    """Yield the attribute dictionary of an object, then each attribute that is a dict, a list or a set itself."""
    yield vars(owner)
    yield from (value for value in list(vars(owner).values()) if isinstance(value, (dict, list, set)))


def _restore(container: Any, before: Any) -> None:
    if _has_same_entries(container, before):  # usually; a write would make compiled code check its guards again
        return
    container.clear()
    if isinstance(container, list):
        container.extend(before)
    else:
        container.update(before)


def _has_same_entries(container: Any, before: Any) -> bool:
    if len(container) != len(before) or isinstance(container, set):
        return bool(container == before)
    if isinstance(container, list):
        return all(new is old for new, old in zip(container, before, strict=True))
    pairs = zip(container.items(), before.items(), strict=True)
    return all(key == old_key and value is old for (key, value), (old_key, old) in pairs)


@dataclass(frozen=True)
class _RandomStates:
    """The random states of PyTorch on the CPU and on GPUs, of Python, and of NumPy if it is imported."""

    cpu: torch.Tensor
    gpus: list[torch.Tensor]
    python: Any
    numpy: Any

    @classmethod
    def current(cls) -> _RandomStates:
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
