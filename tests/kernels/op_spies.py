"""Observes what an op does while it runs: calls of its backward, computed gradients, saved tensors, launches, memory.

Other tests of kernels do not depend on how an op calls its parts.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd.graph import saved_tensors_hooks

from fastlora.kernels.core.implementations import Implementation
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.tools.bench.accuracy import expand_lists


@contextmanager
def backward_calls(op: SemanticOp) -> Iterator[list[tuple[Any, ...]]]:
    """Record the arguments of each run of the op's backward."""
    calls: list[tuple[Any, ...]] = []

    def spy(target: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            calls.append(arguments)
            return target(*arguments, **options)

        return run

    with patch.object(op, "backward_target", spy(op.backward_target)):
        yield calls


@contextmanager
def computed_gradients(op: SemanticOp) -> Iterator[list[set[str]]]:
    """Record the names of all gradients that the op's backward function returns in each call."""
    made: list[set[str]] = []
    choose = op.implementations.backward

    def spied(anchor: torch.Tensor, arguments: dict[str, Any]) -> Implementation:
        implementation = choose(anchor, arguments)

        def backward(**named: Any) -> dict[str, Any]:
            gradients = implementation.backward(**named)
            made.append({name for name, gradient in expand_lists(gradients).items() if gradient is not None})
            return gradients

        return replace(implementation, backward=backward)

    with patch.object(op.implementations, "backward", spied):
        yield made


@contextmanager
def saved_for_backward() -> Iterator[list[torch.Tensor]]:
    """Record the tensors that autograd saves."""
    saved: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        yield saved


@contextmanager
def guarded_memory() -> Iterator[Callable[[], None]]:
    """Fill memory that kernels allocate with nan, with margins of nan; yield a check that the margins are untouched."""
    band, bands = 1024, []

    def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = math.prod(shape)
        poison = math.nan if dtype.is_floating_point else torch.iinfo(dtype).max
        memory = torch.full((size + 2 * band,), poison, dtype=dtype, device=device)
        bands.append((memory, size, poison))
        return memory[band : band + size].view(shape)

    def check() -> None:
        for memory, size, poison in bands:
            around = torch.cat((memory[:band], memory[band + size :]))
            assert (around.isnan() if math.isnan(poison) else around == poison).all()

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("fastlora.kernels.triton") and hasattr(module, "allocate"):
                stack.enter_context(patch.object(module, "allocate", allocate))
        yield check


@contextmanager
def launches() -> Iterator[list[str]]:
    """Record the names of launched kernels, in order."""
    from triton.runtime.jit import KernelInterface

    from fastlora.kernels.core.shortcuts import without

    launched: list[str] = []
    start = KernelInterface.__getitem__

    def spy(kernel: Any, grid: Any) -> Callable[..., Any]:
        launched.append(kernel.fn.__name__)
        return start(kernel, grid)

    with without("traces"), patch.object(KernelInterface, "__getitem__", spy):
        yield launched
