"""A region to replay, and a fake for CUDA graphs that reruns captured functions into the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastlora.runtime.cuda_graphs import RUNS_BEFORE, GraphReplayer
from fastlora.runtime.graph_pool import GraphRecorder
from fastlora.runtime.replay_choice import ReplayTimer


class RerunRecorder(GraphRecorder):
    """Reruns captured functions, and copies the results into the memory of the first ones."""

    replaying = False
    is_full = False

    def capture_device(self) -> torch.device:
        return torch.device("cpu")

    def capture(self, function: Callable[[], Any], transient: bool) -> tuple[Any, Callable[[], None]]:
        result = function()

        def replay() -> None:
            self.replaying = True
            with torch.enable_grad():
                new = function()
            self.replaying = False
            for old, value in zip(tree_leaves(result), tree_leaves(new), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(value)

        return result, replay


class Region:
    """Two layers, one of them frozen; counts the runs that are not replays."""

    def __init__(self, timer: ReplayTimer | None = None) -> None:
        torch.manual_seed(0)
        self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.trained, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.notes: list[str] = []
        self.runs = 0
        self.recorder = RerunRecorder()
        self.replays = GraphReplayer(self.run, self.recorder, self.notes.append, timer)

    def run(self, x: Tensor, frozen: Tensor, trained: Tensor, bias: Tensor, power: int) -> tuple[Any, ...]:
        self.runs += not self.recorder.replaying
        h = torch.tanh(x @ frozen.t()) @ trained.t() + bias
        return h**power, h.detach().argmax(-1), power

    def arguments(self, x: Tensor, power: int = 2) -> tuple[Any, ...]:
        return x, self.frozen, self.trained, self.bias, power

    @property
    def parameters(self) -> list[Tensor]:
        return [self.trained, self.bias]

    def warm(self, x: Tensor, power: int = 2) -> None:
        """Run often enough that the next run with the same key is a replay."""
        for _ in range(RUNS_BEFORE + 1):
            self.replays(*self.arguments(x, power))[0].sum().backward()
        for tensor in (x, *self.parameters):
            tensor.grad = None
        self.runs = 0


def rows(n: int = 3, seed: int = 0, grad: bool = True) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def gradients(region: Region, run: Callable[..., Any], x: Tensor, power: int = 2) -> list[Tensor]:
    y, _, _ = run(*region.arguments(x, power))
    return list(torch.autograd.grad(y.sin().sum(), [x, *region.parameters]))


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    for value, truth in zip(found, expected, strict=True):
        assert torch.equal(value, truth)
