"""Replaying regions, with a stand-in for CUDA graphs that runs what was recorded again, in the same memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fastlora import replay as module
from fastlora.recorder import CudaGraphs, Recorder
from fastlora.replay import RUNS_BEFORE, Replays


class Rerun(Recorder):
    """Runs what was recorded again, and copies the results to where they were."""

    replaying = False
    full = False

    def place(self) -> torch.device:
        return torch.device("cpu")

    def record(self, function: Callable[[], Any], transient: bool) -> tuple[Any, Callable[[], None]]:
        result = function()

        def again() -> None:
            self.replaying = True
            with torch.enable_grad():
                new = function()
            self.replaying = False
            for old, value in zip(tree_leaves(result), tree_leaves(new), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(value)

        return result, again


class Region:
    """Two layers with a parameter each, one of which is frozen; counts how often it runs other than in a replay."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.frozen = nn.Parameter(torch.randn(4, 4), requires_grad=False)
        self.trained, self.bias = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
        self.notes: list[str] = []
        self.runs = 0
        self.recorder = Rerun()
        self.replays = Replays(self.run, self.recorder, self.notes.append)

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
        """Enough runs for the next one of the kind to be a replay."""
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


def test_results_and_gradients_are_those_of_the_graph() -> None:
    region = Region()
    region.warm(rows())
    for seed in range(3):
        x = rows(seed=seed)
        expected, at, _ = region.run(*region.arguments(x))
        truth = gradients(region, region.run, x)
        region.runs = 0
        y, index, power = region.replays(*region.arguments(x))
        found = torch.autograd.grad(y.sin().sum(), [x, *region.parameters])
        assert region.runs == 0
        assert torch.equal(y, expected)
        assert torch.equal(index, at)
        assert not index.requires_grad
        assert power == 2
        assert_equal(list(found), truth)


def test_a_kind_is_run_forward_and_backward_before_it_is_recorded() -> None:
    region = Region()
    for _ in range(2 * RUNS_BEFORE):
        y, _, _ = region.replays(*region.arguments(rows()))
    for n in range(RUNS_BEFORE):
        assert not region.replays.recorded
        y, _, _ = region.replays(*region.arguments(rows()))
        y.sum().backward()
        assert region.runs == 2 * RUNS_BEFORE + n + 1
    region.replays(*region.arguments(rows()))
    assert region.replays.recorded == 1


def test_parameters_that_are_changed_in_place_are_read_anew() -> None:
    region = Region()
    region.warm(rows())
    before = gradients(region, region.replays, rows())
    with torch.no_grad():
        region.trained.mul_(2)
    after = gradients(region, region.replays, rows())
    assert not torch.equal(before[0], after[0])
    assert_equal(after, gradients(region, region.run, rows()))


@pytest.mark.parametrize("other", ["length", "value", "frozen input", "moved parameter"])
def test_inputs_of_another_kind_are_not_replayed(other: str) -> None:
    region = Region()
    region.warm(rows())
    x, power = rows(5 if other == "length" else 3, grad=other != "frozen input"), 3 if other == "value" else 2
    if other == "moved parameter":
        region.trained.data = region.trained.data.clone()
    y, _, _ = region.replays(*region.arguments(x, power))
    assert region.runs == 1
    assert torch.equal(y, region.run(*region.arguments(x, power))[0])


def test_a_second_batch_before_the_backward_of_the_first_leaves_that_ones_memory_alone() -> None:
    region = Region()
    region.warm(rows())
    first, second = rows(seed=1), rows(seed=2)
    one, two = (region.replays(*region.arguments(x))[0] for x in (first, second))
    found = torch.autograd.grad(one.sin().sum() + two.sin().sum(), [first, second, *region.parameters])
    one, two = (region.run(*region.arguments(x))[0] for x in (first, second))
    expected = torch.autograd.grad(one.sin().sum() + two.sin().sum(), [first, second, *region.parameters])
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def test_a_forward_does_not_overwrite_what_later_recordings_have_saved() -> None:
    """Their results may lie where it puts what it needs only for a moment."""
    first, second = Region(), Region()
    second.recorder = second.replays.recorder = first.recorder
    for region in (first, second):
        region.warm(rows())
    x = rows(seed=1)
    in_order = [region.replays(*region.arguments(x)) for region in (first, second)]
    assert (first.runs, second.runs) == (0, 0)
    del in_order
    held = second.replays(*second.arguments(x))
    first.replays(*first.arguments(x))
    assert (first.runs, second.runs) == (1, 0)
    held[0].sum().backward()
    first.replays(*first.arguments(x))
    assert first.runs == 1


def test_results_that_were_dropped_make_way_for_the_next_batch() -> None:
    region = Region()
    region.warm(rows())
    for _ in range(2):
        y = region.replays(*region.arguments(rows()))
        del y
    assert region.runs == 0


def test_what_the_caller_holds_is_never_written_to() -> None:
    region = Region()
    region.warm(rows())
    held = []
    for seed in range(2):
        x = rows(seed=seed)
        y, _, _ = region.replays(*region.arguments(x))
        found = torch.autograd.grad(y.sum(), [x, *region.parameters])
        held.append([y.detach(), *found])
        if seed == 0:
            copies = [t.clone() for t in held[0]]
    assert_equal(held[0], copies)


def test_gradients_add_up_over_batches() -> None:
    region = Region()
    region.warm(rows())
    expected = [torch.zeros_like(p) for p in region.parameters]
    for p in region.parameters:
        p.grad = None
    for seed in range(3):
        x = rows(seed=seed)
        for total, gradient in zip(expected, gradients(region, region.run, x)[1:], strict=True):
            total += gradient
        region.replays(*region.arguments(x))[0].sin().sum().backward()
    for p, total in zip(region.parameters, expected, strict=True):
        assert p.grad is not None
        assert torch.allclose(p.grad, total)


def test_a_retained_graph_can_be_run_through_twice_and_a_freed_one_cannot() -> None:
    region = Region()
    region.warm(rows())
    x = rows()
    y, _, _ = region.replays(*region.arguments(x))
    first = torch.autograd.grad(y.sum(), region.trained, retain_graph=True)
    second = torch.autograd.grad(y.sum(), region.trained)
    assert torch.equal(first[0], second[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), region.trained)


def test_second_derivatives_are_refused() -> None:
    region = Region()
    region.warm(rows())
    x = rows()
    y, _, _ = region.replays(*region.arguments(x))
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_sees_the_same_tensors_in_every_run(reentrant: bool) -> None:
    region = Region()
    region.warm(rows())

    def run(x: Tensor) -> Tensor:
        result: Tensor = region.replays(*region.arguments(x))[0]
        return result

    x = rows()
    y = checkpoint(run, x, use_reentrant=reentrant)
    found = torch.autograd.grad(y.sin().sum(), x) if not reentrant else [_backward(y, x)]
    assert_equal(list(found), gradients(region, region.run, rows())[:1])


def _backward(y: Tensor, x: Tensor) -> Tensor:
    y.sin().sum().backward()
    assert x.grad is not None
    return x.grad


def test_no_recording_begins_inside_a_backward() -> None:
    region = Region()
    for _ in range(RUNS_BEFORE):
        region.replays(*region.arguments(rows()))[0].sum().backward()
    x = rows()
    checkpoint(lambda x: region.replays(*region.arguments(x))[0], x, use_reentrant=True).sum().backward()
    assert not region.replays._recordings


def test_parameters_hooks_see_each_gradient_once() -> None:
    region = Region()
    seen: list[Tensor] = []
    region.trained.register_hook(seen.append)
    region.warm(rows())
    assert len(seen) == RUNS_BEFORE + 1
    seen.clear()
    region.replays(*region.arguments(rows()))[0].sum().backward()
    assert len(seen) == 1


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
def test_graphs_that_cannot_be_replayed_say_so_once(run: Callable[..., Any]) -> None:
    notes: list[str] = []
    replays = Replays(run, Rerun(), notes.append)
    w = nn.Parameter(torch.randn(4, 4))
    for _ in range(5):
        replays(rows(grad=False), w)
    assert len(notes) == 1
    assert list(replays._recordings.values()) == [None]


def test_a_graph_that_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    region = Region()
    monkeypatch.setattr(region.replays.recorder, "record", refuse)
    for _ in range(5):
        x = rows()
        assert_equal(gradients(region, region.replays, x), gradients(region, region.run, x))
    assert len(region.notes) == 1
    assert "not permitted" in region.notes[0]


def test_parameters_that_move_with_every_call_are_not_counted_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_KINDS", 5)
    region = Region()
    for n in range(1, 10):
        region.replays(*region.arguments(rows(n)))
    assert len(region.replays._runs) <= 5


@pytest.mark.parametrize("change", ["written to", "moved"])
def test_a_parameter_that_changes_before_the_backward_is_refused(change: str) -> None:
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


def test_the_backward_does_not_run_under_the_autocast_of_the_forward() -> None:
    """A product in float32 inside of an autocast region has its gradients in float32."""

    def run(x: Tensor, w: Tensor) -> tuple[Tensor]:
        with torch.autocast("cpu", enabled=False):
            return (x @ w,)

    replays = Replays(run, Rerun(), lambda _: None)
    w = nn.Parameter(torch.randn(4, 4))
    for _ in range(RUNS_BEFORE + 2):
        x = rows()
        with torch.autocast("cpu", torch.bfloat16):
            (y,) = replays(x, w)
        (found,) = torch.autograd.grad(y.sum(), x)
    assert replays.recorded == 1
    assert torch.equal(found, torch.ones(3, 4) @ w.t())


def test_tensors_that_wrap_others_are_left_alone() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    def run(x: Tensor, w: Tensor) -> tuple[Tensor]:
        return ((x @ w).to(torch.float32),)

    notes: list[str] = []
    replays = Replays(run, Rerun(), notes.append)
    w = nn.Parameter(TwoTensor(torch.randn(4, 4), torch.randn(4, 4)))
    for _ in range(RUNS_BEFORE + 2):
        replays(rows(), w)
    assert not replays._runs
    assert not replays._recordings


def test_quantised_weights_in_buffers_are_not_copied_in_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 15)
    replays = Replays(lambda x, q: (x @ q.float(),), Rerun(), lambda _: None)
    for _ in range(RUNS_BEFORE + 2):
        replays(rows(), torch.ones(4, 4, dtype=torch.int8))[0].sum().backward()
    assert not replays.recorded


def test_forgotten_recordings_are_freed_after_their_backward() -> None:
    region = Region()
    region.warm(rows())
    held = weakref.ref(next(iter(region.replays._recordings.values())))
    x = rows()
    y, _, _ = region.replays(*region.arguments(x))
    region.replays.forget()
    region.recorder.forget()
    assert torch.equal(
        torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(region.run(*region.arguments(x))[0].sum(), x)[0]
    )
    assert held() is not None
    del y
    gc.collect()
    assert held() is None


def test_recordings_are_forgotten_with_the_model_and_by_disable(monkeypatch: pytest.MonkeyPatch) -> None:
    import fastlora
    from fastlora.session import Session

    forgotten: list[Session] = []
    monkeypatch.setattr(Session, "forget", lambda session: forgotten.append(session))
    model = fastlora.compile(nn.Sequential(nn.Linear(2, 2), nn.Tanh()))
    fastlora.disable(model)
    assert len(forgotten) == 1
    kept = fastlora.compile(model)._compiled_call_impl.session
    del model
    gc.collect()
    assert kept in forgotten[1:]


def test_memory_that_recordings_may_take_is_limited() -> None:
    region = Region()
    region.recorder.full = True
    region.warm(rows())
    assert region.replays.recorded == 0
    assert "of the device's memory" in region.notes[0]


def test_only_so_many_shapes_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_RECORDINGS", 2)
    region = Region()
    for n in (2, 3, 4, 5):
        region.warm(rows(n))
        x = rows(n)
        assert_equal(gradients(region, region.replays, x), gradients(region, region.run, x))
    assert region.replays.recorded == 2
    assert len(set(region.notes)) == 1


def test_nothing_is_recorded_on_a_cpu() -> None:
    region = Region()
    region.replays.recorder = CudaGraphs()
    for _ in range(5):
        region.replays(*region.arguments(rows()))
    assert not region.replays._runs
