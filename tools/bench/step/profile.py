"""Where a step's time goes: the GPU's time by kind of work, beside the least that this work can take.

A kernel belongs to the outermost range around its launch that says what it is for: an op of fastlora's, attention, the
optimizer. What no such range is around is named after the outermost operator of PyTorch's, and counts as the rest.
Between kernels the GPU is idle: it waits for the host, or for the next kernel to start.
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fastlora.tools.bench.step.measurement import Trainer

STEPS = 3
REST = "rest"
IDLE = "idle"
PRODUCTS = "LoRA layers"
_OP = "fastlora::"
_GROUPS = {
    "lora": PRODUCTS,
    "glu": PRODUCTS,
    "rms_norm": "norms",
    "add_rms_norm": "norms",
    "rotary": "rotary",
    "linear_cross_entropy": "head and loss",
    "dropout": "dropout",
}
_MARKS = {"attention": ("scaled_dot_product", "flash_attn", "cudnn_attention"), "optimizer": ("Optimizer.",)}
_LIMITS = {"GLU": PRODUCTS, "embedding": REST}
_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_RANGES = ("cpu_op", "user_annotation")
_LAUNCHES = ("cuda_runtime", "cuda_driver")

Event = dict[str, Any]


def time_by_work(trainer: Trainer) -> dict[str, Any]:
    """Seconds of a step by kind of work: {kind: {what did it: seconds}}, the largest first."""
    with torch.profiler.profile() as found:
        for _ in range(STEPS):
            trainer.step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = {
        kind: {name: time / STEPS / 1e6 for name, time in sorted(parts.items(), key=lambda item: -item[1])}
        for kind, parts in attributed(events).items()
    }
    return dict(sorted(kinds.items(), key=lambda item: -sum(item[1].values())))


def attributed(events: Iterable[Event]) -> dict[str, dict[str, float]]:
    """Microseconds of a trace in Chrome's format, by kind of work and kernel; those of the rest by operator."""
    launches: dict[int, Event] = {}
    ranges: defaultdict[Any, list[Event]] = defaultdict(list)
    work = []
    for event in events:
        kind = event.get("cat")
        if kind in _WORK:
            work.append(event)
        elif kind in _RANGES and "dur" in event:
            ranges[event["tid"]].append(event)
        elif kind in _LAUNCHES and "correlation" in event.get("args", {}):
            launches[event["args"]["correlation"]] = event
    threads = {tid: _Thread(found) for tid, found in ranges.items()}
    kinds: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for each in work:
        launch = launches.get(each["args"].get("correlation"))
        around = threads[launch["tid"]].around(launch["ts"]) if launch and launch["tid"] in threads else []
        kind = next((found for name in around if (found := _kind(name))), REST)
        named = [name for name in around if not name.startswith("autograd::engine")]
        kinds[kind][named[0] if kind == REST and named else each["name"]] += each["dur"]
    return {**kinds, IDLE: {IDLE: _idle(work)}}


def _idle(work: list[Event]) -> float:
    """The time between the first and the last of some work in which nothing ran."""
    idle, busy_until = 0.0, float("inf")
    for each in sorted(work, key=lambda event: event["ts"]):
        idle += max(0.0, each["ts"] - busy_until)
        ends = each["ts"] + each["dur"]
        busy_until = ends if busy_until == float("inf") else max(busy_until, ends)
    return idle


class _Thread:
    """The ranges of one thread, which nest."""

    def __init__(self, ranges: list[Event]) -> None:
        self._starts: list[float] = []
        self._stacks: list[list[Event]] = []
        open_: list[Event] = []
        for each in sorted(ranges, key=lambda e: (e["ts"], -e["dur"])):
            open_ = [outer for outer in open_ if outer["ts"] + outer["dur"] > each["ts"]]
            open_.append(each)
            self._starts.append(each["ts"])
            self._stacks.append(list(open_))

    def around(self, time: float) -> list[str]:
        """The names of the ranges around a time, the outermost first."""
        index = bisect_right(self._starts, time) - 1
        stack = self._stacks[index] if index >= 0 else []
        return [each["name"] for each in stack if each["ts"] + each["dur"] >= time]


def _kind(name: str) -> str | None:
    if name.startswith(_OP):
        op = name.removeprefix(_OP)
        return next((group for prefix, group in _GROUPS.items() if op.startswith(prefix)), op)
    return next((kind for kind, marks in _MARKS.items() if any(mark in name for mark in marks)), None)


def beside_limit(kinds: dict[str, dict[str, float]], limits: dict[str, float]) -> list[tuple[str, float, float | None]]:
    """Each kind of work with its seconds and the least that it can take, the largest first."""
    least: dict[str, float] = defaultdict(float)
    for name, seconds in limits.items():
        direction = name.endswith((" forward", " backward", " decoded"))
        least[PRODUCTS if direction else _LIMITS.get(name, name)] += seconds
    return [(kind, sum(parts.values()), least.get(kind)) for kind, parts in kinds.items()]
