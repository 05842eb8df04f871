"""`fastlora bench kernels`: every op against its limit, eager PyTorch, torch.compile and the peers, on one GPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from fastlora.tools.bench.accuracy import Accuracy, accuracy, affordable, cotangents, flat, leaves
from fastlora.tools.bench.cases import Arguments, Case
from fastlora.tools.bench.contenders import MINE, Contender, contender
from fastlora.tools.bench.measure import ceilings, device_time, extra_memory, host_time

_CACHED = 512 << 20
"""Bytes of data that do not fit in any cache."""
_SETS = 4
"""Sets of arguments at least, if they are no larger than `_LARGE` bytes: where memory lies makes a tenth of a copy's
time, so no contender's should depend on one place."""
_LARGE = 8 << 30
_FAILED = "none"
"""The direction of a contender that failed."""


@dataclass(frozen=True)
class Timing:
    """One contender in one direction of one case; `problem` says why there is no time."""

    case: Case
    contender: str
    direction: str
    seconds: float | None = None
    host_seconds: float | None = None
    share: float | None = None
    extra_bytes: int | None = None
    problem: str | None = None


def check(case: Case, dtype: torch.dtype) -> list[Accuracy]:
    """The errors of the case's results, where the truth can be afforded."""
    return accuracy(case, dtype, torch.device("cuda")) if affordable(case) else []


def measure(case: Case, names: list[str], dtype: torch.dtype) -> list[Timing]:
    """Times of fastlora and of each contender that has the op, forward and backward.

    Everybody is measured twice, the second time in the opposite order, and the shorter time counts: what was done just
    before, and where memory came to lie, makes a difference of several percent.
    """
    prepared = {name: prepare for name in (MINE, *names) if (prepare := contender(name, case)) is not None}
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
    except Exception as problem:  # a peer that fails at a shape is a finding, not the end of the run
        if name == MINE:
            raise
        return [Timing(case, name, _FAILED, problem=f"{type(problem).__name__}: {problem}"[:200])]
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def _measure(case: Case, name: str, prepare: Contender, dtype: torch.dtype) -> Iterator[Timing]:
    directions = case.directions
    moved = sum(case.work(direction, dtype)[1] for direction in directions)
    count = min(16, 1 + int(_CACHED // moved))
    count = max(count, _SETS) if moved <= _LARGE else count
    sets = [case.arguments(dtype, torch.device("cuda"), seed) for seed in range(count)]
    passes = [_passes(prepare, arguments) for arguments in sets]
    for direction in directions:
        limit = ceilings(dtype).limit(*case.work(direction, dtype))
        seconds = device_time([run[direction] for run in passes])
        host = host_time(passes[0][direction], calls=max(1, min(30, int(0.01 / seconds))))
        extra = extra_memory(passes[0][direction])
        yield Timing(case, name, direction, seconds, host, limit / seconds, extra)


def _passes(prepare: Contender, arguments: Arguments) -> dict[str, Callable[[], Any]]:
    """The forward pass, the backward pass of one forward pass as often as one likes, and the two together. The gradient
    of a loss is 1, as in `loss.backward()`."""
    forward = prepare(arguments)
    wanted = list(leaves(arguments).values())
    if not wanted:
        return {"forward": forward}
    outputs = flat(forward())
    grads = [g if g.dim() else torch.ones_like(g) for g in cotangents(outputs)]
    differentiate = partial(torch.autograd.grad, inputs=wanted, grad_outputs=grads, allow_unused=True)
    return {
        "forward": forward,
        "backward": partial(differentiate, outputs, retain_graph=True),
        "both": lambda: differentiate(flat(forward())),
    }
