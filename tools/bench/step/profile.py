"""GPU time of a step by kind of work, compared with the least time of that work.

A kernel is attributed to the outermost profiler range around its launch that identifies the work: an op of fastlora,
attention, or the optimizer. Other kernels count as the rest, by the outermost PyTorch operator. Time between kernels is
idle: the GPU waits for the host, or for the next kernel to start.
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
LORA_LAYERS = "LoRA layers"
_OP = "fastlora::"
_GROUPS = {
    "lora": LORA_LAYERS,
    "glu": LORA_LAYERS,
    "rms_norm": "norms",
    "add_rms_norm": "norms",
    "rotary": "rotary",
    "linear_cross_entropy": "head and loss",
    "dropout": "dropout",
}
_NAME_PARTS = {"attention": ("scaled_dot_product", "flash_attn", "cudnn_attention"), "optimizer": ("Optimizer.",)}
_KIND_OF_PART = {"GLU": LORA_LAYERS, "embedding": REST}
_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
_RANGES = ("cpu_op", "user_annotation")
_LAUNCHES = ("cuda_runtime", "cuda_driver")

Event = dict[str, Any]


def time_by_work(trainer: Trainer) -> dict[str, Any]:
    """Return seconds of a step as {kind of work: {kernel: seconds}}, the largest first."""
    with torch.profiler.profile() as profile:
        for _ in range(STEPS):
            trainer.step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = {
        kind: {name: time / STEPS / 1e6 for name, time in sorted(parts.items(), key=lambda item: -item[1])}
        for kind, parts in attribute(events).items()
    }
    return dict(sorted(kinds.items(), key=lambda item: -sum(item[1].values())))


def attribute(events: Iterable[Event]) -> dict[str, dict[str, float]]:
    """Return microseconds by kind of work and kernel from events of a Chrome trace; the rest is by operator."""
    launches: dict[int, Event] = {}
    ranges: defaultdict[Any, list[Event]] = defaultdict(list)
    kernels = []
    for event in events:
        kind = event.get("cat")
        if kind in _WORK:
            kernels.append(event)
        elif kind in _RANGES and "dur" in event:
            ranges[event["tid"]].append(event)
        elif kind in _LAUNCHES and "correlation" in event.get("args", {}):
            launches[event["args"]["correlation"]] = event
    threads = {tid: _Thread(events) for tid, events in ranges.items()}
    kinds: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
    for each in kernels:
        launch = launches.get(each["args"].get("correlation"))
        names = threads[launch["tid"]].ranges_at(launch["ts"]) if launch and launch["tid"] in threads else []
        kind = next((found for name in names if (found := _kind(name))), REST)
        operators = [name for name in names if not name.startswith("autograd::engine")]
        kinds[kind][operators[0] if kind == REST and operators else each["name"]] += each["dur"]
    return {**kinds, IDLE: {IDLE: _idle(kernels)}}


def _idle(kernels: list[Event]) -> float:
    """Return the time between the first and the last kernel in which none ran."""
    idle, busy_until = 0.0, float("inf")
    for each in sorted(kernels, key=lambda event: event["ts"]):
        idle += max(0.0, each["ts"] - busy_until)
        ends = each["ts"] + each["dur"]
        busy_until = ends if busy_until == float("inf") else max(busy_until, ends)
    return idle


class _Thread:
    """The profiler ranges of one thread, which are nested."""

    def __init__(self, ranges: list[Event]) -> None:
        self._starts: list[float] = []
        self._stacks: list[list[Event]] = []
        open_: list[Event] = []
        for each in sorted(ranges, key=lambda e: (e["ts"], -e["dur"])):
            open_ = [outer for outer in open_ if outer["ts"] + outer["dur"] > each["ts"]]
            open_.append(each)
            self._starts.append(each["ts"])
            self._stacks.append(list(open_))

    def ranges_at(self, time: float) -> list[str]:
        """Return the names of the ranges at a time, the outermost first."""
        index = bisect_right(self._starts, time) - 1
        stack = self._stacks[index] if index >= 0 else []
        return [each["name"] for each in stack if each["ts"] + each["dur"] >= time]


def _kind(name: str) -> str | None:
    if name.startswith(_OP):
        op = name.removeprefix(_OP)
        return next((group for prefix, group in _GROUPS.items() if op.startswith(prefix)), op)
    return next((kind for kind, parts in _NAME_PARTS.items() if any(part in name for part in parts)), None)


def with_limits(kinds: dict[str, dict[str, float]], limits: dict[str, float]) -> list[tuple[str, float, float | None]]:
    """Return (kind, seconds, limit in seconds or None) for each kind of work. `limits` are seconds of the parts of
    `limit.py`."""
    least: dict[str, float] = defaultdict(float)
    for name, seconds in limits.items():
        is_linear = name.endswith((" forward", " backward", " decoded"))
        least[LORA_LAYERS if is_linear else _KIND_OF_PART.get(name, name)] += seconds
    return [(kind, sum(parts.values()), least.get(kind)) for kind, parts in kinds.items()]
