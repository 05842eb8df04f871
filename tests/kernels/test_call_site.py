"""Call sites plan, record and replay calls, with results equal to the registered operator's bit for bit."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from op_cases import complete, cotangents, f32, flat, leaves, replaced
from op_spies import saved_for_backward
from test_dora import CASES as DORA
from test_glu import CASES as GLU
from test_layer_norm import CASES as LAYER_NORMS
from test_linear_cross_entropy import CASES as LOSSES
from test_lora_group import CASES as GROUPS
from test_lora_linear import CASES as LAYERS
from test_lora_mlp import CASES as MLPS
from test_rms_norm import CASES as NORMS
from test_rotary import CASES as ROTARY

from fastlora.kernels.core import shortcuts
from fastlora.kernels.core.call_site import CallSite, call_site
from fastlora.kernels.core.recompute import recomputing
from fastlora.kernels.core.shortcuts import without
from fastlora.kernels.ops import glu, lora_linear, rms_norm

IMPLEMENTATIONS = ["pytorch", "triton"]
EVERY = [*LAYERS, *GROUPS, *MLPS, *NORMS, *LAYER_NORMS, *GLU, *ROTARY, *LOSSES]


class Calls:
    """Calls an op on the leaves of some arguments, through its operator and through a call site."""

    def __init__(self, case: Any, wanted: Callable[[int], bool] = lambda i: True) -> None:
        self.op = case.op
        self.given = complete(case.op, case.arguments(f32))
        named = leaves(self.given)
        self.inputs = {n: t.detach().requires_grad_(wanted(i)) for i, (n, t) in enumerate(named.items())}
        self.given = replaced(self.given, self.inputs)
        values = self.op.order(self.given)
        self.site, self.tensors = call_site(self.op, values[: len(self.op.names)])

    def results(self, run: Callable[[], Any], **how: Any) -> list[torch.Tensor | None]:
        outputs = flat(run())
        inputs = [t for t in self.inputs.values() if t.requires_grad]
        reached = [(t, g) for t, g in zip(outputs, cotangents(outputs), strict=True) if t.requires_grad]
        if not reached:
            return list(outputs)
        tensors, incoming = zip(*reached, strict=True)
        return [*outputs, *torch.autograd.grad(tensors, inputs, incoming, allow_unused=True, **how)]

    def by_operator(self) -> list[torch.Tensor | None]:
        return self.results(lambda: self.op(**self.given))

    def by_site(self, **how: Any) -> list[torch.Tensor | None]:
        return self.results(lambda: self.site(*self.tensors), **how)


def assert_equal(found: list[torch.Tensor | None], expected: list[torch.Tensor | None]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one, other)
            assert one.stride() == other.stride()


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_results_equal_the_operators_bit_for_bit(case: Any) -> None:
    """The first call runs, the second is recorded, and later ones are replayed if possible."""
    calls = Calls(case)
    expected = calls.by_operator()
    for _ in range(4):
        assert_equal(calls.by_site(), expected)


@pytest.mark.pytorch_only
@pytest.mark.parametrize("case", DORA, ids=str)
def test_results_of_ops_without_kernels_equal_the_operators(case: Any) -> None:
    test_results_equal_the_operators_bit_for_bit(case)


@pytest.mark.parametrize("case", [*LAYERS[:3], *GROUPS[:2], *MLPS[:2], *NORMS[:2], *ROTARY[:2]], ids=str)
@pytest.mark.parametrize("kept", [0, 1, 2])
def test_only_needed_gradients_are_computed(case: Any, kept: int) -> None:
    calls = Calls(case, lambda i: i % 3 == kept)
    expected = calls.by_operator()
    for _ in range(3):
        assert_equal(calls.by_site(), expected)


@pytest.mark.parametrize("case", [LAYERS[0], GROUPS[0], MLPS[0], NORMS[0]], ids=str)
def test_a_second_backward_of_a_retained_graph_gives_equal_gradients(case: Any) -> None:
    calls = Calls(case)
    for _ in range(3):
        outputs = flat(calls.site(*calls.tensors))
        inputs, incoming = list(calls.inputs.values()), cotangents(outputs)
        first, second = (torch.autograd.grad(outputs, inputs, incoming, retain_graph=again) for again in (True, False))
        assert_equal(list(first), list(second))


@pytest.mark.parametrize("case", MLPS[:2], ids=str)
def test_recomputing_residuals_changes_no_bit(case: Any) -> None:
    calls = Calls(case)
    expected = calls.by_operator()
    for _ in range(3):
        with recomputing() as not_saved:
            outputs = calls.site(*calls.tensors)
        assert not_saved.bytes > 0
        assert_equal(calls.results(lambda outputs=outputs: outputs), expected)
        assert_equal(calls.by_site(), expected)


def test_no_gradient_is_computed_for_an_unused_output() -> None:
    calls = Calls(GROUPS[0])
    for _ in range(3):
        first = flat(calls.site(*calls.tensors))[0]
        one = torch.autograd.grad(first.sum(), calls.inputs["x"])[0]
        other = torch.autograd.grad(flat(calls.op(**calls.given))[0].sum(), calls.inputs["x"])[0]
        assert torch.equal(one, other)


@contextmanager
def counted(op: Any) -> Iterator[list[str]]:
    """Record the runs of an op's implementations, without replays."""
    runs: list[str] = []
    before = op.implementations.forward, op.implementations.backward

    def forward(*given: Any) -> Any:
        runs.append("forward")
        return before[0](*given)

    def backward(*given: Any) -> Any:
        runs.append("backward")
        return before[1](*given)

    op.implementations.forward, op.implementations.backward = forward, backward
    try:
        yield runs
    finally:
        del op.implementations.forward, op.implementations.backward


def small_layer() -> Calls:
    return Calls(LAYERS[0])


def test_the_second_call_is_recorded_and_later_ones_are_replayed() -> None:
    calls = small_layer()
    with counted(calls.op) as runs:
        for _ in range(5):
            calls.by_site()
    assert runs == ["forward", "backward"] * 2


@pytest.mark.pytorch_only
def test_a_nested_operator_is_replayed_as_a_whole() -> None:
    """Such as the dropout before an adapter."""
    calls = next(calls for case in LAYERS if (calls := Calls(case)).given["seed"] is not None)
    with counted(calls.op) as runs:
        for _ in range(4):
            calls.by_site()
    assert runs == ["forward", "backward"] * 2


def test_without_traces_or_plans_each_call_runs_the_implementation() -> None:
    for kind in ("traces", "plans"):
        calls = small_layer()
        with counted(calls.op) as runs, without(kind):
            for _ in range(3):
                calls.by_site()
        assert runs == ["forward", "backward"] * 3
    assert shortcuts.use.traces
    assert shortcuts.use.plans


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "size": lambda t: t[:-1],
    "strides": lambda t: t.t().contiguous().t(),
    "start": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view_as(t),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_layout_has_its_own_plan(change: str) -> None:
    x, gate = torch.randn(6, 8), torch.randn(6, 8)
    other = CHANGES[change](x)
    site, _ = call_site(glu, [x, gate, "silu", f32])
    for _ in range(4):
        for t in (x, other):
            g = gate[: t.shape[0]]
            assert torch.equal(site(t, g), glu(gate=t, up=g, activation="silu", out_dtype=f32))


def test_each_requires_grad_has_its_own_plan() -> None:
    x, up = torch.randn(3, 8), torch.randn(3, 8)
    site, _ = call_site(glu, [x, up, "silu", f32])
    for _ in range(3):
        assert not site(x, up).requires_grad
        assert site(x.clone().requires_grad_(), up).requires_grad
        with torch.no_grad():
            assert not site(x.clone().requires_grad_(), up).requires_grad


def test_one_tensor_may_be_passed_twice() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    site, _ = call_site(glu, [x, torch.empty_like(x), "silu", f32])
    expected = torch.autograd.grad(glu(gate=x, up=x, activation="silu", out_dtype=f32).sum(), x)[0]
    for _ in range(3):
        assert torch.equal(torch.autograd.grad(site(x, x).sum(), x)[0], expected)


def test_different_numbers_have_different_plans() -> None:
    x = torch.randn(3, 8)
    eps = object()
    site, given = call_site(rms_norm, rms_norm.order(norm(x, eps)), varies=lambda v: v is eps or v is x)
    assert given == [x, eps]
    for _ in range(3):
        for value in (0.0, 1e-6, 1.0, -0.0):
            assert torch.equal(site(x, value)[0], rms_norm(**norm(x, value)))


def norm(x: Any, eps: Any) -> dict[str, Any]:
    return {
        "x": x, "weight": None, "eps": eps, "offset": 0.0, "compute_dtype": f32, "norm_dtype": f32, "scale_dtype": f32,
        "out_dtype": f32,
    }  # fmt: skip


def test_a_recording_keeps_no_tensor_alive() -> None:
    calls = small_layer()
    result = [calls.by_site() for _ in range(4)]
    alive = [weakref.ref(t) for each in result for t in each if t is not None]
    alive += [weakref.ref(t) for t in calls.inputs.values()]
    site = calls.site
    del calls, result
    gc.collect()
    assert not any(ref() is not None for ref in alive)
    assert isinstance(site, CallSite)


def test_autocast_is_ignored_and_restored() -> None:
    calls = small_layer()
    expected = calls.by_operator()
    for _ in range(3):
        with torch.autocast(calls.inputs["x"].device.type, dtype=torch.bfloat16):
            outputs = calls.site(*calls.tensors)
            assert torch.is_autocast_enabled(calls.inputs["x"].device.type)
        assert_equal(calls.results(lambda outputs=outputs: outputs), expected)


def test_dispatch_modes_see_the_operator() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    calls = small_layer()
    expected = calls.by_operator()
    for _ in range(2):
        calls.by_site()
    with FlopCounterMode(display=False):
        found = calls.by_site()
    assert_equal(found, expected)
    outputs = flat(calls.site(*calls.tensors))
    with FlopCounterMode(display=False):
        found = calls.results(lambda: outputs)
    assert_equal(found, expected)


def test_the_profiler_shows_the_name_of_the_op() -> None:
    calls = small_layer()
    for _ in range(3):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            calls.by_site()
        names = {event.name for event in profile.events()}
        assert {f"fastlora::{calls.op.name}", f"fastlora::{calls.op.name}_backward"} <= names


def test_hooks_on_saved_tensors_see_each_call() -> None:
    calls = small_layer()
    counts = []
    for _ in range(4):
        with saved_for_backward() as saved:
            calls.by_site()
        counts.append(len(saved))
    assert len(set(counts)) == 1
    assert counts[0] > 0


def test_a_second_derivative_raises() -> None:
    calls = small_layer()
    for _ in range(3):
        y = flat(calls.site(*calls.tensors))[0]
        with pytest.raises(RuntimeError, match="lora_linear has no second derivative"):
            torch.autograd.grad(y.sum(), calls.inputs["x"], create_graph=True)


def test_writing_to_a_saved_tensor_raises_in_the_backward() -> None:
    calls = small_layer()
    for _ in range(3):
        y = flat(calls.site(*calls.tensors))[0]
        with torch.no_grad():
            calls.inputs["lora_a"].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("case", [MLPS[0], LOSSES[0]], ids=str)
def test_tensors_kept_by_saved_tensor_hooks_are_not_overwritten(case: Any) -> None:
    calls = Calls(case)
    for _ in range(3):
        with saved_for_backward() as saved:
            outputs = flat(calls.site(*calls.tensors))
        before = [t.detach().clone() for t in saved]
        torch.autograd.grad(outputs, list(calls.inputs.values()), cotangents(outputs), allow_unused=True)
        for now, then in zip(saved, before, strict=True):
            torch.testing.assert_close(now.detach(), then, rtol=0, atol=0, equal_nan=True)


def test_unpack_hooks_may_return_another_layout() -> None:
    for case in LOSSES[:3]:
        calls = Calls(case)
        expected = calls.by_operator()
        turn = lambda t: t.transpose(0, 1).contiguous().transpose(0, 1) if t.dim() > 1 else t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(turn, lambda t: t):
            found = calls.by_site()
        for one, other in zip(found, expected, strict=True):
            if one is not None and other is not None:
                torch.testing.assert_close(one, other)


MOST_FRAMES = {"forward": 25, "backward": 20}


def frames_of(function: Callable[[], Any], name: str) -> tuple[int, Any]:
    """Return how many Python frames a call enters, from the first of a function `name` on, and its result."""
    frames: list[Any] = []

    def note(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and (frames or frame.f_code.co_name == name):
            frames.append(frame)
        elif event == "return" and frames and frame is frames[0]:
            sys.setprofile(None)

    sys.setprofile(note)
    try:
        result = function()
    finally:
        sys.setprofile(None)
    return len(frames), result


@pytest.mark.pytorch_only
def test_a_replayed_layer_runs_few_python_frames() -> None:
    calls = small_layer()
    assert calls.op is lora_linear
    for _ in range(3):
        calls.by_site()
    forward, outputs = frames_of(lambda: calls.site(*calls.tensors), "__call__")
    (y,) = flat(outputs)
    backward, _ = frames_of(lambda: y.backward(torch.ones_like(y)), "apply")
    assert 0 < forward <= MOST_FRAMES["forward"]
    assert 0 < backward <= MOST_FRAMES["backward"]
