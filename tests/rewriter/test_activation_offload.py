"""Offloaded activations come back unchanged and in time, and writes to them are detected."""

from __future__ import annotations

import gc
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from copies import Copy, LateCopies
from torch import Tensor

from fastlora.runtime import activation_offload
from fastlora.runtime.activation_offload import ActivationOffloader


@pytest.fixture(autouse=True)
def nothing_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)


class Offloading:
    """An offloader whose copies end late, and a function of a few layers whose saved tensors are offloaded."""

    def __init__(self) -> None:
        self.streams, self.notes, self.seen = LateCopies(), [], []
        self.offloader = ActivationOffloader(self.streams, self.notes.append)

    def __call__(self, x: Tensor, layers: int = 3) -> Tensor:
        for _ in range(layers):
            with self.offloader.hooks(set(), self.seen.append, offload=True):
                x = x.sin().exp()
        return x

    @property
    def copies_back(self) -> int:
        return sum(what == "to_device" for what, _ in self.streams.log)


def rows(n: int = 5) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()


def expected(x: Tensor, layers: int = 3) -> Tensor:
    y = x
    for _ in range(layers):
        y = y.sin().exp()
    return torch.autograd.grad(y.sum(), x)[0]


@pytest.mark.parametrize("copied", [False, True])
def test_gradients_are_bit_identical(copied: bool) -> None:
    run, x = Offloading(), rows()
    y = run(x)
    if copied:
        run.offloader.free_copied(0)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected(x))
    assert len(run.streams.log) == 6 + copied * 6
    assert run.seen == [x.nbytes] * 6


def test_device_memory_is_freed_once_the_copy_is_done() -> None:
    run = Offloading()
    y = run(rows())
    originals = [weakref.ref(each.original) for each in run.offloader._copying]
    del y
    assert all(each() is not None for each in originals)
    run.offloader.free_copied()  # no copy is done
    assert all(each() is not None for each in originals)
    run.offloader.free_copied(3 * 80)
    gc.collect()
    assert [each() is None for each in originals] == [True] * 3 + [False] * 3
    assert run.streams.waits == 3
    run.streams.end()
    run.offloader.free_copied()
    gc.collect()
    assert all(each() is None for each in originals)


def test_a_storage_still_on_the_device_is_not_copied_back() -> None:
    run, x = Offloading(), rows()
    y = run(x)
    torch.autograd.grad(y.sum(), x)
    assert run.copies_back == 0


def test_reading_a_storage_prefetches_the_previous_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offload, "PREFETCH_BYTES", 2 * 80)
    run, x = Offloading(), rows()
    y = run(x)
    run.offloader.free_copied(0)
    waits, copies_back = [], []

    def watch(*_: object) -> None:
        waits.append(run.streams.waits)
        copies_back.append(run.copies_back)
        run.streams.end()

    before = run.streams.waits
    for node in _chain(y.grad_fn):
        node.register_hook(watch)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected(x))
    assert copies_back == [3, 4, 5, 6, 6, 6]
    assert [w - before for w in waits] == [1] * 6  # all but the first were prefetched in time


def _chain(node):  # type: ignore[no-untyped-def]
    while node is not None and node.name() != "torch::autograd::AccumulateGrad":
        yield node
        node = node.next_functions[0][0]


def test_views_of_one_storage_are_copied_once() -> None:
    streams = LateCopies()
    offloader, seen = ActivationOffloader(streams, lambda _: None), []
    x = rows(6)
    with offloader.hooks(set(), seen.append, offload=True):
        both = x.exp()
        top, rest = both[:2], both[2:]
        y = top.square().sum() + (rest * rest.t()[:, :1].t()).sum()
    offloader.free_copied(0)
    found = torch.autograd.grad(y, x)[0]
    assert streams.log == [("to_host", both.nbytes), ("to_device", both.nbytes)]
    assert seen == [both.nbytes]
    again = x.exp()
    y = again[:2].square().sum() + (again[2:] * again[2:].t()[:, :1].t()).sum()
    assert torch.equal(found, torch.autograd.grad(y, x)[0])


def test_a_second_backward_copies_from_the_host_again() -> None:
    run, x = Offloading(), rows()
    y = run(x)
    run.offloader.free_copied(0)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    second = torch.autograd.grad(y.sum(), x)[0]
    assert torch.equal(first, second)
    assert run.copies_back == 12


def test_parameters_and_excluded_storages_are_not_offloaded() -> None:
    streams = LateCopies()
    offloader, seen = ActivationOffloader(streams, lambda _: None), []
    weight, mask, x = torch.nn.Parameter(torch.randn(4, 4)), torch.randn(5, 4), rows()
    with offloader.hooks({mask.untyped_storage().data_ptr()}, seen.append, offload=True):
        y = (x * mask) @ weight
    assert len(streams.log) == 1  # x * mask
    offloader.free_copied(0)
    found = torch.autograd.grad(y.sum(), [x, weight])
    truth = torch.autograd.grad(((x * mask) @ weight).sum(), [x, weight])
    assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True))


def changed(copied_before_write: bool = False, copied_after_write: bool = False) -> tuple[Tensor, Tensor]:
    """Return an input and a result for which twice the input is saved, offloaded and then written to."""
    offloader, x = ActivationOffloader(LateCopies(), lambda _: None), rows()
    with offloader.hooks(set(), lambda _: None, offload=True):
        inner = x * 2
        y = inner.sin()
    if copied_before_write:
        offloader.free_copied(0)
    with torch.no_grad():
        inner.add_(1)
    if copied_after_write:
        offloader.free_copied(0)
    return x, y


@pytest.mark.parametrize("copied", [False, True])
def test_a_write_before_the_copy_is_done_raises(copied: bool) -> None:
    _, y = changed(copied_after_write=copied)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_write_after_the_copy_is_harmless() -> None:
    x, y = changed(copied_before_write=True)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], 2 * (x * 2).cos())


def test_a_full_host_is_noted_and_tensors_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    run, x = Offloading(), rows()

    def refuse(memory: Tensor) -> None:
        raise RuntimeError("CUDA error: out of memory\nmore")

    monkeypatch.setattr(run.streams, "to_host", refuse)
    assert torch.equal(torch.autograd.grad(run(x).sum(), x)[0], expected(x))
    assert run.notes == ["memory_budget: the host has no more memory for activations: CUDA error: out of memory"]
    assert run.streams.log == []


def test_memory_of_a_pending_copy_is_not_reused() -> None:
    run = Offloading()
    y = run(rows())
    run.offloader.free_copied(0)
    y = y * 1.0
    run.offloader.prefetch([y], headroom=10**9)
    torch.autograd.grad(y.sum(), y)  # prefetches, although no backward of a layer runs
    assert run.copies_back == 6
    assert not any(copy.over for copy in run.streams.open[6:])
    del y
    gc.collect()
    assert all(copy.over for copy in run.streams.open)


def test_complex_tensors_are_not_offloaded() -> None:
    streams = LateCopies()
    offloader = ActivationOffloader(streams, lambda _: None)
    x = torch.randn(4, dtype=torch.complex64, requires_grad=True)
    with offloader.hooks(set(), lambda _: None, offload=True):
        y = (x.conj() * x * x).abs().sum()
    assert streams.log == []
    assert torch.equal(torch.autograd.grad(y, x)[0], torch.autograd.grad((x.conj() * x * x).abs().sum(), x)[0])


@pytest.mark.parametrize("small", [1, 10**9])
@pytest.mark.parametrize("moves", [False, True])
def test_a_write_to_a_kept_tensor_raises(small: int, moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd does not check the versions of saved tensors with hooks."""
    monkeypatch.setattr(activation_offload, "MIN_BYTES", small)
    offloader, x, weight = (
        ActivationOffloader(LateCopies(), lambda _: None),
        rows(),
        torch.nn.Parameter(torch.randn(4, 4)),
    )
    with offloader.hooks({weight.untyped_storage().data_ptr()}, lambda _: None, moves):
        y = (x * 2) @ weight
    with torch.no_grad():
        weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y.sum(), x)


def test_a_forward_without_backward_frees_all_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 10**9)  # saved results are not offloaded
    run = Offloading()
    y = run(rows())
    result = weakref.ref(y)
    del y
    gc.collect()
    assert result() is None


def test_a_negative_view_stays_negative() -> None:
    offloader = ActivationOffloader(LateCopies(), lambda _: None)
    view, x = torch.randn(5, 4, dtype=torch.complex64).conj().imag, rows()
    assert view.is_neg()
    with offloader.hooks(set(), lambda _: None, offload=True):
        y = (x * view).sum()
    offloader.free_copied(0)
    assert torch.equal(torch.autograd.grad(y, x)[0], view)


def test_offloading_is_thread_safe() -> None:
    class Slow(LateCopies):
        def is_done(self, end: Copy) -> bool:
            time.sleep(0.001)
            return super().is_done(end)

    run = Offloading()
    run.offloader.streams = run.streams = Slow()
    y = run(rows(), layers=10)
    run.streams.end()
    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: run.offloader.free_copied(), range(8)))
    assert not run.offloader._copying
    assert y.grad_fn is not None
