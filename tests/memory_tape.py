"""A fake for CUDA graphs that models their memory: operators are recorded with addresses, in pools that reuse memory.

Memory that a capture has freed by its end may be used by a later capture, which replaying the first one then
overwrites, as on a GPU.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fastlora.runtime.graph_pool import GraphRecorder

ALIGNMENT = 1024


class Block(np.ndarray):
    """Memory that is in use as long as this object, or a tensor that was made from it, is alive."""


class Pool:
    """Blocks of memory, which are reused in the order in which they were freed."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self.at: dict[int, np.ndarray] = {}

    def allocate(self, nbytes: int) -> np.ndarray:
        size = -(-nbytes // ALIGNMENT) * ALIGNMENT
        memory = next((m for m in self._free if m.nbytes == size), None)
        if memory is None:
            memory = np.zeros(size, np.uint8)
            self.at[memory.ctypes.data] = memory
        else:
            self._free = [m for m in self._free if m is not memory]
        block = memory.view(Block)
        weakref.finalize(block, lambda: self._free.append(memory))
        return block


class Tape(TorchDispatchMode):
    """Runs operators with their results in a pool, and replays them at the same addresses."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self._pool, self._steps = pool, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if any(r.alias_info is not None for r in func._schema.returns):
            if any(a.alias_info is not None and a.alias_info.is_write for a in func._schema.arguments):
                self._steps.append((func, *tree_map(self._by_address, (args, kwargs)), None))
            return result
        result = tree_map(self._in_pool, result)
        self._steps.append((func, *tree_map(self._by_address, (args, kwargs, result))))
        return result

    def replay(self) -> None:
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, result in self._steps:
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=False):
                    if isinstance(old, torch.Tensor):
                        old.copy_(new)

    def _in_pool(self, t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or t.numel() == 0:
            return t
        memory = torch.from_numpy(self._pool.allocate(t.nbytes)).view(t.dtype)
        return memory.as_strided(t.size(), torch.empty_like(t, device="meta").stride()).copy_(t)

    def _by_address(self, t: Any) -> Any:
        """Return the same tensor of the pool without keeping its block in use."""
        if not isinstance(t, torch.Tensor):
            return t
        memory = self._pool.at.get(t.untyped_storage().data_ptr())
        if memory is None:
            return t.detach()
        return torch.from_numpy(memory).view(t.dtype).as_strided(t.size(), t.stride(), t.storage_offset())


class TapeRecorder(GraphRecorder):
    """Captures functions on tapes, with a pool for forwards and one for backwards."""

    is_full = False

    def __init__(self) -> None:
        super().__init__()
        self._pools = Pool(), Pool()

    def capture_device(self) -> torch.device:
        return torch.device("cpu")

    def capture(self, function: Callable[[], Any], transient: bool) -> tuple[Any, Callable[[], None]]:
        tape = Tape(self._pools[transient])
        with tape:
            result = function()
        return result, tape.replay
