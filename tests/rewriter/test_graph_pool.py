"""No replay overwrites memory that a pending backward reads, in any order of layers and batches."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from memory_tape import TapeRecorder
from torch import Tensor, nn

from fastlora.runtime.captured_region import CapturedRegion
from fastlora.runtime.cuda_graphs import GraphReplayer

Batch = tuple[Tensor, Tensor, Tensor]
"""The input of a batch, and its results with and without replays."""


class Layer:
    """A layer with values that only its forward needs, and values that it saves."""

    def __init__(self, recorder: TapeRecorder) -> None:
        self.parameters = [nn.Parameter(torch.randn(8, 8) / 2), nn.Parameter(torch.randn(8, 8) / 2)]
        self.replays = GraphReplayer(self.run, recorder, note=lambda _: None)

    def run(self, x: Tensor, a: Tensor, b: Tensor) -> tuple[Any, ...]:
        h = torch.tanh(x @ a)
        passing = ((x.detach() * 3).exp().clamp(max=5) * 2 + 1).log()
        x = x + passing.mean(-1, keepdim=True)
        gate = torch.sigmoid(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) @ b)
        return x + (h * gate) @ a, gate.detach().mean()


class Training:
    """Batches of several lengths through layers in several orders, with up to three pending backwards."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.random = random.Random(seed)
        recorder = TapeRecorder()
        self.layers = [Layer(recorder) for _ in range(3)]
        self.parameters = [p for layer in self.layers for p in layer.parameters]
        self.open: list[Batch] = []
        self.wrong = 0

    def begin(self) -> None:
        x = torch.randn(self.random.choice([2, 3, 4]), 8).requires_grad_()
        order = self.layers if self.random.random() < 0.7 else self.random.sample(self.layers, 3)
        kept = [layer for layer in order if self.random.random() < 0.8] or self.layers[:1]
        y = expected = x
        for layer in kept:
            y = layer.replays(y, *layer.parameters)[0]
            expected = layer.run(expected, *layer.parameters)[0]
        self.wrong += not torch.allclose(y, expected, atol=1e-5)
        self.open.append((x, y, expected))

    def finish(self) -> None:
        x, y, expected = self.open.pop(self.random.randrange(len(self.open)))
        if self.random.random() < 0.1:
            return  # dropped without a backward
        inputs = [x, *self.parameters]
        if self.random.random() < 0.2:
            torch.autograd.grad(y.sin().sum(), inputs, allow_unused=True, retain_graph=True)
        found, truth = (torch.autograd.grad(t.sin().sum(), inputs, allow_unused=True) for t in (y, expected))
        for a, b in zip(found, truth, strict=True):
            self.wrong += (a is None) != (b is None) or (a is not None and not torch.allclose(a, b, atol=1e-4))

    def run(self, batches: int) -> None:
        for _ in range(batches):
            self.begin()
            while self.open and (len(self.open) > 2 or self.random.random() < 0.7):
                self.finish()


@pytest.fixture(autouse=True)
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return how many forwards were replayed."""
    count, call = [0], CapturedRegion.__call__

    def counted(recording: CapturedRegion, args: Any) -> Any:
        count[0] += 1
        return call(recording, args)

    monkeypatch.setattr(CapturedRegion, "__call__", counted)
    return count


@pytest.mark.parametrize("seed", range(4))
def test_pending_batches_keep_their_saved_tensors(seed: int, replayed: list[int]) -> None:
    training = Training(seed)
    training.run(60)
    assert training.wrong == 0
    assert replayed[0] > 20


def test_without_can_replay_memory_is_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TapeRecorder, "can_replay", lambda *_: True)
    wrong = 0
    for seed in range(4):
        training = Training(seed)
        training.run(60)
        wrong += training.wrong
    assert wrong > 0
