"""GPU time of a step by kind of work, from a profiler trace."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from fastlora.tools.bench.step.profile import attribute, with_limits
from fastlora.tools.bench.step.results import profile_table


def _range(name: str, begin: float, end: float, thread: int = 1) -> dict[str, Any]:
    return {"cat": "cpu_op", "name": name, "ts": begin, "dur": end - begin, "tid": thread}


def _kernel(name: str, launched: float, begin: float, duration: float, thread: int = 1) -> list[dict[str, Any]]:
    key = {"correlation": int(10 * begin)}
    launch = {"cat": "cuda_runtime", "name": "launch", "ts": launched, "dur": 1, "tid": thread, "args": key}
    return [launch, {"cat": "kernel", "name": name, "ts": begin, "dur": duration, "tid": 7, "args": key}]


TRACE = [
    _range("autograd::engine::evaluate_function: Op", 0, 40),
    _range("fastlora::lora_mlp_backward", 1, 30),
    _range("fastlora::dropout", 2, 5),  # belongs to the op around it
    *_kernel("sum_kernel", 3, 100, 50),
    *_kernel("sum_kernel", 8, 150, 10),
    _range("aten::add_", 41, 60),
    _range("aten::copy_", 42, 50),
    *_kernel("elementwise", 43, 170, 20),  # after 10 us of idle time
    _range("aten::scaled_dot_product_attention", 0, 10, thread=2),
    *_kernel("fmha", 5, 180, 30, thread=2),
    *_kernel("unknown", 99, 215, 5, thread=3),
]


def test_kernels_are_attributed_to_the_outermost_known_range() -> None:
    assert attribute(TRACE) == {
        "LoRA layers": {"sum_kernel": 60},
        "attention": {"fmha": 30},
        "rest": {"aten::add_": 20, "unknown": 5},
        "idle": {"idle": 10 + 5},
    }


def test_the_profile_has_the_limit_of_each_kind_of_work() -> None:
    limits = {"o forward": 10e-6, "o backward": 20e-6, "GLU": 5e-6, "attention": 15e-6, "embedding": 1e-6}
    kinds = {kind: {name: 1e-6 * time for name, time in parts.items()} for kind, parts in attribute(TRACE).items()}
    rows = {kind: (seconds, limit) for kind, seconds, limit in with_limits(kinds, limits)}
    assert rows["LoRA layers"] == pytest.approx((60e-6, 35e-6))
    assert rows["rest"] == pytest.approx((25e-6, 1e-6))
    assert rows["idle"][1] is None
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(profile_table({"contender": "fastlora", "profile": kinds}, limits))
    shown = console.export_text()
    assert "LoRA layers" in shown
    assert "1.71" in shown
