"""Which graphs are not captured, which captures are not replayed, and when captures are freed."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from replayed_region import Region, RerunRecorder, assert_equal, gradients, rows
from torch import Tensor, nn

from fastlora.runtime import cuda_graphs as module
from fastlora.runtime.cuda_graphs import RUNS_BEFORE, GraphReplayer
from fastlora.runtime.graph_pool import CudaGraphRecorder


@pytest.mark.parametrize("run", [
    lambda x, w: (x.add_(1) @ w,),
    lambda x, w: (x,),
    lambda x, w: (lambda y: (y, y.view(-1)))(x @ w),
    lambda x, w: (nn.Parameter(x @ w),),
    lambda x, w: (x @ w, w * 2),
    lambda x, w: ((x @ w).detach(),),
], ids=[
    "writes to its input",
    "returns its input",
    "returns a view",
    "returns no plain tensor",
    "has two results with gradients",
    "has none",
])  # fmt: skip
def test_a_graph_that_cannot_be_captured_is_noted_once(run: Callable[..., Any]) -> None:
    notes: list[str] = []
    replays = GraphReplayer(run, RerunRecorder(), notes.append)
    w = nn.Parameter(torch.randn(4, 4))
    for _ in range(5):
        replays(rows(grad=False), w)
    assert len(notes) == 1
    assert list(replays._captures.values()) == [None]


def test_a_graph_without_gradients_is_neither_captured_nor_noted() -> None:
    notes: list[str] = []
    replays = GraphReplayer(lambda x, w: (x @ w,), RerunRecorder(), notes.append)
    for _ in range(5):
        replays(rows(grad=False), nn.Parameter(torch.randn(4, 4), requires_grad=False))
    assert notes == []
    assert replays.captured == 0


def test_a_graph_whose_capture_fails_runs_uncaptured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    region = Region()
    monkeypatch.setattr(region.replays.recorder, "capture", refuse)
    for _ in range(5):
        x = rows()
        assert_equal(gradients(region, region.replays, x), gradients(region, region.run, x))
    assert len(region.notes) == 1
    assert "not permitted" in region.notes[0]


def test_the_number_of_counted_keys_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_KEYS", 5)
    region = Region()
    for n in range(1, 10):
        region.replays(*region.arguments(rows(n)))
    assert len(region.replays._runs) <= 5


@pytest.mark.parametrize("change", ["written to", "moved"])
def test_a_parameter_written_before_the_backward_raises(change: str) -> None:
    region = Region()
    region.warm(rows())
    y, _, _ = region.replays(*region.arguments(rows()))
    if change == "moved":
        region.frozen.data = region.frozen.data.clone()
    else:
        with torch.no_grad():
            region.trained.mul_(2)
    with pytest.raises(RuntimeError, match="modified or moved"):
        y.sum().backward()


def test_a_graph_whose_buffers_change_is_not_captured() -> None:
    buffer, w = torch.ones(4), nn.Parameter(torch.randn(4, 4))
    replays = GraphReplayer(
        lambda x, b, w: ((x + b) @ w,), RerunRecorder(), lambda _: None, static_inputs=frozenset([1])
    )
    for _ in range(RUNS_BEFORE + 3):
        y = replays(rows(), buffer, w)[0]
        buffer.add_(1)
        y.sum().backward()
    assert not replays.captured


def test_wrapper_subclasses_are_not_captured() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    def run(x: Tensor, w: Tensor) -> tuple[Tensor]:
        return ((x @ w).to(torch.float32),)

    notes: list[str] = []
    replays = GraphReplayer(run, RerunRecorder(), notes.append)
    w = nn.Parameter(TwoTensor(torch.randn(4, 4), torch.randn(4, 4)))
    for _ in range(RUNS_BEFORE + 2):
        replays(rows(), w)
    assert not replays._runs
    assert not replays._captures


def test_quantized_weights_in_buffers_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_INTEGERS", 15)
    replays = GraphReplayer(lambda x, q: (x @ q.float(),), RerunRecorder(), lambda _: None)
    for _ in range(RUNS_BEFORE + 2):
        replays(rows(), torch.ones(4, 4, dtype=torch.int8))[0].sum().backward()
    assert not replays.captured


def test_cleared_captures_are_freed_after_their_backward() -> None:
    region = Region()
    region.warm(rows())
    held = weakref.ref(next(iter(region.replays._captures.values())))
    x = rows()
    y, _, _ = region.replays(*region.arguments(x))
    region.replays.clear()
    region.recorder.clear()
    assert torch.equal(
        torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(region.run(*region.arguments(x))[0].sum(), x)[0]
    )
    assert held() is not None
    del y
    gc.collect()
    assert held() is None


def test_captures_are_cleared_with_the_model_and_by_disable(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastlora
    from fastlora.frontend.session import Session

    forgotten: list[Session] = []
    monkeypatch.setattr(Session, "drop_cuda_graphs", lambda session: forgotten.append(session))
    model = fastlora.compile(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    fastlora.disable(model)
    assert len(forgotten) == 1
    kept = fastlora.compile(model)._compiled_call_impl.session
    del model
    gc.collect()
    assert kept in forgotten[1:]


def test_the_memory_of_captures_is_limited() -> None:
    region = Region()
    region.recorder.is_full = True
    region.warm(rows())
    assert region.replays.captured == 0
    assert "of the device's memory" in region.notes[0]


def test_the_number_of_captured_shapes_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_CAPTURES", 2)
    region = Region()
    for n in (2, 3, 4, 5):
        region.warm(rows(n))
        x = rows(n)
        assert_equal(gradients(region, region.replays, x), gradients(region, region.run, x))
    assert region.replays.captured == 2
    assert len(set(region.notes)) == 1


def test_nothing_is_captured_on_a_cpu() -> None:
    region = Region()
    region.replays.recorder = CudaGraphRecorder()
    for _ in range(5):
        region.replays(*region.arguments(rows()))
    assert not region.replays._runs
