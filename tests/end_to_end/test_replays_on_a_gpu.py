"""Training steps whose regions are replayed as CUDA graphs, against eager ones."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import batch, build
from torch import Tensor, nn

import fastlora
from fastlora.runtime.cuda_graphs import RUNS_BEFORE

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")

STEPS = 2 * (RUNS_BEFORE + 2)


def train(model: nn.Module, lengths: list[int], accumulate: int = 1, autocast: bool = False) -> list[Tensor]:
    """Return the losses of some steps, each on another batch."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for i in range(STEPS):
        for part in range(accumulate):
            inputs = {k: v.cuda() for k, v in batch(lengths[i % len(lengths)], seed=10 * i + part).items()}
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                loss = model(**inputs).loss
            loss.backward()
            losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("lengths", [[16], [16, 24]], ids=["one length", "two lengths"])
@pytest.mark.parametrize("accumulate", [1, 2], ids=["", "accumulated"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_losses_of_replayed_regions_equal_eager(
    family: str, accumulate: int, lengths: list[int], autocast: bool
) -> None:
    eager = build(family).cuda()
    model = fastlora.compile(copy.deepcopy(eager), mode="reduce-overhead")
    expected, found = (train(m, lengths, accumulate, autocast) for m in (eager, model))
    assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=3e-2 if autocast else 1e-4)
    notes = fastlora.report(model).notes
    assert not [note for note in notes if "not replayed" in note], notes
    assert _captures(model) > 0


def test_launches_that_a_gpu_waits_for_are_replayed_by_default() -> None:
    """A tiny model waits for launches; with mode="no-cudagraphs" it is not replayed."""
    for mode, replays in (("default", True), ("no-cudagraphs", False)):
        model = fastlora.compile(build("llama").cuda(), mode=mode)
        train(model, [16])
        assert (_captures(model) > 0) == replays


def _captures(model: nn.Module) -> int:
    graphs = model._compiled_call_impl.session.graphs
    return sum(graph.replayer.captured for graph in graphs if graph.replayer is not None)


def test_quantized_weights_are_read_in_place() -> None:
    """They are not copied for every replay, and layers of the same shapes have separate captures."""
    from quantized_models import Format
    from quantized_models import build as build_quantized

    eager = build_quantized("llama", Format(), "cuda")
    model = fastlora.compile(build_quantized("llama", Format(), "cuda"), mode="reduce-overhead")
    expected, found = (train(m, [16]) for m in (eager, model))
    assert torch.allclose(torch.stack(found), torch.stack(expected), rtol=1e-4)
    assert _captures(model) >= 2
    for graph in model._compiled_call_impl.session.graphs:
        captures = graph.replayer._captures.values() if graph.replayer is not None else ()
        for capture in filter(None, captures):
            copied = [capture._inputs[i] for i in capture._copied]
            assert not any(t.dtype is torch.uint8 for t in copied)
