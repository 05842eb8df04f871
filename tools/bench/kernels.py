"""Check and time one case: fastlora and each contender, on one GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastlora.tools.bench.accuracy import Accuracy, accuracy, cotangents, fits_in_float64, flat, leaves
from fastlora.tools.bench.cases import Arguments, Case
from fastlora.tools.bench.contenders import FASTLORA, Contender, contender
from fastlora.tools.bench.measure import ceilings, device_time, extra_memory, host_time

_EXCEEDS_CACHES = 512 << 20
"""Bytes that fit in no cache of the GPU. A case is timed on sets of arguments that have at least this size together."""
_MIN_SETS = 4
"""Least number of sets of arguments, if a set is no larger than `_LARGE_SET` bytes. The address of a tensor changes the
time of a copy by up to a tenth, so the time should not depend on one allocation."""
_LARGE_SET = 8 << 30
_FAILED = "none"
"""Direction in the `Timing` of a contender that failed."""


@dataclass(frozen=True)
class Timing:
    """Times of one contender for one pass of a case.

    Attributes:
        direction: "forward", "backward" or "both".
        seconds: GPU time.
        host_seconds: time of a call from Python.
        share: the limit of the case over `seconds`.
        extra_bytes: peak memory of a call beyond its arguments.
        problem: why there is no time, or None.
    """

    case: Case
    contender: str
    direction: str
    seconds: float | None = None
    host_seconds: float | None = None
    share: float | None = None
    extra_bytes: int | None = None
    problem: str | None = None


def check(case: Case, dtype: torch.dtype) -> list[Accuracy]:
    """Return the errors of a case, or [] if it is too large for float64."""
    return accuracy(case, dtype, torch.device("cuda")) if fits_in_float64(case) else []


def measure(case: Case, names: list[str], dtype: torch.dtype) -> list[Timing]:
    """Return the times of fastlora and of each contender that has the op.

    All are measured twice, in opposite orders, and the shorter time counts: the work just before a measurement and the
    addresses of tensors change times by several percent.
    """
    prepared = {name: prepare for name in (FASTLORA, *names) if (prepare := contender(name, case)) is not None}
    best: dict[tuple[str, str], Timing] = {}
    with torch.cuda.stream(torch.cuda.Stream()):
        for name in (*prepared, *reversed(prepared)):
            if (name, _FAILED) not in best:
                for timing in _attempt(case, name, prepared[name], dtype):
                    key = (name, timing.direction)
                    if key not in best or (timing.seconds or 0) < (best[key].seconds or 0):
                        best[key] = timing
    return list(best.values())


def _attempt(case: Case, name: str, prepare: Contender, dtype: torch.dtype) -> list[Timing]:
    try:
        return list(_measure(case, name, prepare, dtype))
    except Exception as problem:  # other libraries may not support a shape
        if name == FASTLORA:
            raise
        return [Timing(case, name, _FAILED, problem=f"{type(problem).__name__}: {problem}"[:200])]
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _measure(case: Case, name: str, prepare: Contender, dtype: torch.dtype) -> Iterator[Timing]:
    directions = case.directions
    num_bytes = sum(case.work(direction, dtype)[1] for direction in directions)
    count = min(16, 1 + int(_EXCEEDS_CACHES // num_bytes))
    count = max(count, _MIN_SETS) if num_bytes <= _LARGE_SET else count
    sets = [case.arguments(dtype, torch.device("cuda"), seed) for seed in range(count)]
    passes = [_passes(prepare, arguments) for arguments in sets]
    for direction in directions:
        limit = ceilings(dtype).limit(*case.work(direction, dtype))
        seconds = device_time([run[direction] for run in passes])
        host = host_time(passes[0][direction], calls=max(1, min(30, int(0.01 / seconds))))
        extra = extra_memory(passes[0][direction])
        yield Timing(case, name, direction, seconds, host, limit / seconds, extra)


def _passes(prepare: Contender, arguments: Arguments) -> dict[str, Callable[[], Any]]:
    """Return a function for each pass. "backward" can be called repeatedly; the incoming gradient of a loss is 1, as in
    `loss.backward()`."""
    forward = prepare(arguments)
    inputs = list(leaves(arguments).values())
    if not inputs:
        return {"forward": forward}
    outputs = flat(forward())
    grads = [g if g.dim() else torch.ones_like(g) for g in cotangents(outputs)]
    differentiate = partial(torch.autograd.grad, inputs=inputs, grad_outputs=grads, allow_unused=True)
    return {
        "forward": forward,
        "backward": partial(differentiate, outputs, retain_graph=True),
        "both": lambda: differentiate(flat(forward())),
    }
