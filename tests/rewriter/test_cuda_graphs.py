"""Replayed regions return what running them returns, and never write to tensors of the caller."""

from __future__ import annotations

import pytest
import torch
from replayed_region import Region, RerunRecorder, assert_equal, gradients, rows
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlora.runtime.cuda_graphs import RUNS_BEFORE, GraphReplayer


def test_replayed_results_and_gradients_equal_the_graphs() -> None:
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


def test_inputs_run_forward_and_backward_before_capture() -> None:
    region = Region()
    for _ in range(2 * RUNS_BEFORE):
        y, _, _ = region.replays(*region.arguments(rows()))
    for n in range(RUNS_BEFORE):
        assert not region.replays.captured
        y, _, _ = region.replays(*region.arguments(rows()))
        y.sum().backward()
        assert region.runs == 2 * RUNS_BEFORE + n + 1
    region.replays(*region.arguments(rows()))
    assert region.replays.captured == 1


def test_replays_read_updated_parameters() -> None:
    region = Region()
    region.warm(rows())
    before = gradients(region, region.replays, rows())
    with torch.no_grad():
        region.trained.mul_(2)
    after = gradients(region, region.replays, rows())
    assert not torch.equal(before[0], after[0])
    assert_equal(after, gradients(region, region.run, rows()))


def test_buffers_are_read_in_place() -> None:
    held, w = torch.randn(4, 4), nn.Parameter(torch.randn(4, 4))
    replays = GraphReplayer(
        lambda x, q, w: (torch.tanh(x @ q) @ w,), RerunRecorder(), lambda _: None, static_inputs=frozenset([1])
    )
    for _ in range(RUNS_BEFORE + 1):
        replays(rows(), held, w)[0].sum().backward()
    assert replays.captured == 1
    x = rows(seed=1)
    for buffer in (held, held.mul_(2)):
        assert torch.equal(replays(x, buffer, w)[0], torch.tanh(x @ buffer) @ w)
    for other in (held.clone(), held.t()):  # at another address, or with other strides
        assert torch.equal(replays(x, other, w)[0], torch.tanh(x @ other) @ w)
    assert replays.captured == 1


@pytest.mark.parametrize("other", ["length", "value", "frozen input", "moved parameter"])
def test_inputs_with_another_key_are_not_replayed(other: str) -> None:
    region = Region()
    region.warm(rows())
    x, power = rows(5 if other == "length" else 3, grad=other != "frozen input"), 3 if other == "value" else 2
    if other == "moved parameter":
        region.trained.data = region.trained.data.clone()
    y, _, _ = region.replays(*region.arguments(x, power))
    assert region.runs == 1
    assert torch.equal(y, region.run(*region.arguments(x, power))[0])


def test_a_second_batch_does_not_overwrite_the_pending_first_one() -> None:
    region = Region()
    region.warm(rows())
    first, second = rows(seed=1), rows(seed=2)
    one, two = (region.replays(*region.arguments(x))[0] for x in (first, second))
    found = torch.autograd.grad(one.sin().sum() + two.sin().sum(), [first, second, *region.parameters])
    one, two = (region.run(*region.arguments(x))[0] for x in (first, second))
    expected = torch.autograd.grad(one.sin().sum() + two.sin().sum(), [first, second, *region.parameters])
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))


def test_a_replay_does_not_overwrite_later_captures() -> None:
    """The results of later captures may use memory that it needs temporarily."""
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


def test_a_capture_is_reusable_once_its_results_are_deleted() -> None:
    region = Region()
    region.warm(rows())
    for _ in range(2):
        y = region.replays(*region.arguments(rows()))
        del y
    assert region.runs == 0


def test_replays_never_write_to_returned_tensors() -> None:
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


def test_gradients_accumulate_over_batches() -> None:
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


def test_a_second_backward_requires_retain_graph() -> None:
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
def test_nothing_is_replayed_under_saved_tensor_hooks(reentrant: bool) -> None:
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


def test_nothing_is_captured_inside_a_backward() -> None:
    region = Region()
    for _ in range(RUNS_BEFORE):
        region.replays(*region.arguments(rows()))[0].sum().backward()
    x = rows()
    checkpoint(lambda x: region.replays(*region.arguments(x))[0], x, use_reentrant=True).sum().backward()
    assert not region.replays._captures


def test_hooks_of_parameters_run_once() -> None:
    region = Region()
    seen: list[Tensor] = []
    region.trained.register_hook(seen.append)
    region.warm(rows())
    assert len(seen) == RUNS_BEFORE + 1
    seen.clear()
    region.replays(*region.arguments(rows()))[0].sum().backward()
    assert len(seen) == 1


def test_the_backward_is_captured_without_autocast() -> None:
    """A float32 product inside an autocast region has float32 gradients."""

    def run(x: Tensor, w: Tensor) -> tuple[Tensor]:
        with torch.autocast("cpu", enabled=False):
            return (x @ w,)

    replays = GraphReplayer(run, RerunRecorder(), lambda _: None)
    w = nn.Parameter(torch.randn(4, 4))
    for _ in range(RUNS_BEFORE + 2):
        x = rows()
        with torch.autocast("cpu", torch.bfloat16):
            (y,) = replays(x, w)
        (found,) = torch.autograd.grad(y.sum(), x)
    assert replays.captured == 1
    assert torch.equal(found, torch.ones(3, 4) @ w.t())
