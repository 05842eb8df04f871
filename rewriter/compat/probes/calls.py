"""Probes of `fastlora.compat.calls`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.compat import calls
from fastlora.compat.probes.probe import collector, expect

PROBES, probe = collector()


@probe("dispatch_keys")
def _keys_distinguish_plain_tensors() -> None:
    x, y = torch.ones(2), torch.ones(3, 4)
    key = calls.dispatch_keys(x).raw_repr()
    expect(key == calls.dispatch_keys(y).raw_repr(), "plain tensors have the same keys")
    expect(key != calls.dispatch_keys(torch.complex(x, x).conj()).raw_repr(), "lazy conjugates have others")
    expect(key != calls.dispatch_keys(x.to("meta")).raw_repr(), "tensors of other devices have others")


@probe("below_autograd", "below_views")
def _operators_run_below_autograd() -> None:
    x = torch.ones(2, requires_grad=True)
    with calls.below_autograd():
        expect(not (x * 2).requires_grad, "a result below autograd has no history")
    with torch.no_grad(), calls.below_views():
        expect(not x.view(1, 2)._is_view(), "a result below views is not a view")


@probe("keeps_graph")
def _retain_graph_is_reported() -> None:
    kept: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    for retain in (True, False):
        y = x * 2
        y.register_hook(lambda _: kept.append(calls.keeps_graph()))
        y.sum().backward(retain_graph=retain)
    expect(kept == [True, False], "whether a backward retains the graph is reported")


@probe("profiler_is_enabled")
def _profiler_state_is_reported() -> None:
    expect(calls.profiler_is_enabled() is False, "the profiler is off by default")


@probe("assert_async")
def _zero_raises() -> None:
    calls.assert_async(torch.tensor(True), "")
    try:
        calls.assert_async(torch.tensor(False), "")
    except RuntimeError:
        return
    expect(False, "zero raises")


@probe("current_device", "current_stream")
def _devices_and_streams_are_numbers() -> None:
    if torch.cuda.is_available():
        device = torch.cuda.current_device()
        expect(calls.current_device() == device, "the device is PyTorch's current one")
        stream = torch.cuda.current_stream(device).cuda_stream
        expect(calls.current_stream(device) == stream, "the stream is PyTorch's current one")


@probe("is_contiguous_or_false", "is_fake")
def _contiguous_and_fake_tensors_are_recognized() -> None:
    x = torch.ones(2, 3)
    expect(
        calls.is_contiguous_or_false(x) and not calls.is_contiguous_or_false(x.t()), "contiguous tensors are recognized"
    )
    with torch._subclasses.FakeTensorMode() as mode:
        expect(calls.is_fake(mode.from_tensor(x)) and not calls.is_fake(x), "fake tensors are recognized")


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        return t * 2

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g * 2


@probe("apply_of")
def _a_function_is_applied() -> None:
    x = torch.ones(2, requires_grad=True)
    calls.apply_of(_Doubled)(x).sum().backward()
    expect(x.grad is not None and x.grad.tolist() == [2, 2], "forward and backward of the function run")


@probe("layout_check")
def _layouts_are_distinguished() -> None:
    x, w = torch.zeros(3, 8), torch.zeros(3, 8)
    check = calls.layout_check([x, w])
    expect(check(torch.ones(3, 8), torch.ones(3, 8)), "tensors of the same layouts pass")
    others = {
        "sizes": torch.zeros(4, 8),
        "strides": torch.zeros(8, 3).t(),
        "dtypes": torch.zeros(3, 8, dtype=torch.float64),
        "requires_grad": torch.zeros(3, 8, requires_grad=True),
        "classes": nn.Parameter(torch.zeros(3, 8), requires_grad=False),
        "devices": torch.zeros(3, 8, device="meta"),
    }
    for what, other in others.items():
        expect(not check(other, w), f"other {what} do not pass")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expect(not check(x, w), "tensors under autocast do not pass")
    expect(not check(x, x), "one tensor twice does not pass")
    expect(not calls.layout_check([x, x])(x, x), "one tensor twice never passes")
