"""Runs `fastlora bench kernels`: checks each case, times what passes, shows and writes the results."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from fastlora.tools.bench import results
from fastlora.tools.bench.cases import Case, cases
from fastlora.tools.bench.contenders import NAMES, installed
from fastlora.tools.bench.kernels import Timing, check, measure
from fastlora.tools.bench.measure import ceilings
from fastlora.tools.bench.shapes import SHAPES
from fastlora.tools.problems import RunError, UsageError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Sweep:
    """What to benchmark; empty means all."""

    output: Path
    models: list[str] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    contenders: list[str] = field(default_factory=list)
    dtype: str = "bfloat16"
    timed: bool = True
    seconds: float | None = None


def run(sweep: Sweep, console: Console) -> bool:
    """Benchmarks a sweep; False if a case failed its check.

    Raises:
        UsageError: for an unknown name.
        RunError: without a CUDA device.
    """
    _check(sweep)
    dtype, names = DTYPES[sweep.dtype], [n for n in installed() if not sweep.contenders or n in sweep.contenders]
    timings: list[results.Row] = []
    accuracies: list[results.Row] = []
    started, wrong, left = time.monotonic(), [], 0
    for case in chosen(sweep):
        if sweep.seconds is not None and time.monotonic() - started > sweep.seconds:
            left += 1
            continue
        errors = check(case, dtype)
        accuracies += [results.accuracy_row(found) for found in errors]
        if not all(found.passes for found in errors):
            wrong.append(case)
            console.print(f"[red]not timed, its error is too large:[/] {case}")
            continue
        if not sweep.timed:
            continue
        rows = measure(case, names, dtype)
        timings += [results.timing_row(timing) for timing in rows]
        console.print(_line(case, rows), highlight=False)
    conditions = results.environment(ceilings(dtype), dtype)
    results.write(sweep.output, conditions, timings, accuracies)
    console.print(results.table(results.beside(timings)))
    note = f", {left} cases left out for lack of time" if left else ""
    console.print(f"{len(timings)} timings, {len(wrong)} cases with too large an error{note}; see {sweep.output}")
    return not wrong


def chosen(sweep: Sweep) -> Iterator[Case]:
    """The cases of a sweep, the common numbers of tokens first."""
    for tokens in sweep.tokens or [8192, 1, 2048, 128, 65536]:
        for name, shape in SHAPES.items():
            if not sweep.models or name in sweep.models:
                yield from (
                    c for c in cases(shape, tokens, sweep.ranks or [16]) if not sweep.ops or c.op.name in sweep.ops
                )


def _line(case: Case, rows: list[Timing]) -> str:
    times = [f"{r.contender} {r.direction[0]} {r.seconds * 1e6:.1f}" if r.seconds else f"{r.contender} -" for r in rows]
    return f"{case}: " + ", ".join(times)


def _check(sweep: Sweep) -> None:
    from fastlora.kernels import ops

    known = {"models": list(SHAPES), "ops": list(ops.__all__), "contenders": list(NAMES), "dtype": list(DTYPES)}
    for option, allowed in known.items():
        given = getattr(sweep, option)
        for name in [given] if isinstance(given, str) else given:
            if name not in allowed:
                raise UsageError(f"--{option} {name}: unknown; choose from {', '.join(allowed)}")
    if not torch.cuda.is_available():
        raise RunError("benchmarks of kernels need a CUDA device, and PyTorch sees none here")
