"""A size of one that is broadcast is not traced as a dynamic size, or only until that fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastlora

ROWS, HEADS, LENGTH = 2, 4, 6


class Block(nn.Module):
    """A block with a mask of rows, or one of scores that all heads share."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.layer, self.breaks = nn.Linear(LENGTH, LENGTH), breaks
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, scores: Tensor, mask: Tensor) -> Tensor:
        self.calls += 1
        scores = self.layer(scores)
        if self.breaks:
            torch._dynamo.graph_break()
        return scores * mask[:, None, None] if mask.dim() == 2 else scores + mask


class Stack(nn.Module):
    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(breaks) for _ in range(3))

    def forward(self, scores: Tensor) -> Tensor:
        rows, square = torch.ones(ROWS, LENGTH), torch.ones(ROWS, 1, LENGTH, LENGTH)
        for block, mask in zip(self.blocks, (rows, square, rows), strict=True):
            scores = block(scores, mask)
        return scores.sum()


@pytest.mark.parametrize("breaks", [False, True])
def test_results_equal_eager_and_nothing_runs_twice(breaks: bool) -> None:
    torch.manual_seed(0)
    model, scores = Stack(breaks), torch.randn(ROWS, HEADS, LENGTH, LENGTH)
    expected = torch.autograd.grad(model(scores), list(model.parameters()))
    fastlora.compile(model)
    for calls in (2, 3):
        found = torch.autograd.grad(model(scores), list(model.parameters()))
        assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
        assert [float(block.calls) for block in model.blocks] == [calls] * 3


def test_an_invalid_shape_raises_once() -> None:
    model = Stack(breaks=False)
    fastlora.compile(model)
    with pytest.raises(RuntimeError, match=r"shape|size"):
        model(torch.randn(ROWS, HEADS, LENGTH, LENGTH + 1))
