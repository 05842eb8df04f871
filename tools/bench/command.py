"""Implementation of `fastlora bench kernels`: check each case, time those that pass, show and write the results."""

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
from fastlora.tools.errors import RunError, UsageError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Options:
    """Options of `fastlora bench kernels`. Empty lists mean all, `timed=False` only checks, and no case is started
    after `seconds`.
    """

    output: Path
    models: list[str] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    contenders: list[str] = field(default_factory=list)
    dtype: str = "bfloat16"
    timed: bool = True
    seconds: float | None = None


def run(options: Options, console: Console) -> bool:
    """Run the benchmark, and return whether all cases passed the accuracy check.

    Raises:
        UsageError: for an unknown name.
        RunError: without a CUDA device.
    """
    _check(options)
    dtype, names = DTYPES[options.dtype], [n for n in installed() if not options.contenders or n in options.contenders]
    timings: list[results.Row] = []
    accuracies: list[results.Row] = []
    started, inaccurate, skipped = time.monotonic(), [], 0
    for case in selected_cases(options):
        if options.seconds is not None and time.monotonic() - started > options.seconds:
            skipped += 1
            continue
        errors = check(case, dtype)
        accuracies += [results.accuracy_row(found) for found in errors]
        if not all(found.passes for found in errors):
            inaccurate.append(case)
            console.print(f"[red]not timed, less accurate than allowed:[/] {case}")
            continue
        if not options.timed:
            continue
        rows = measure(case, names, dtype)
        timings += [results.timing_row(timing) for timing in rows]
        console.print(_line(case, rows), highlight=False)
    conditions = results.environment(ceilings(dtype), dtype)
    results.write(options.output, conditions, timings, accuracies)
    console.print(results.table(results.with_ratios(timings)))
    note = f", {skipped} cases skipped after the time limit" if skipped else ""
    console.print(f"{len(timings)} timings, {len(inaccurate)} inaccurate cases{note}; see {options.output}")
    return not inaccurate


def selected_cases(options: Options) -> Iterator[Case]:
    """Yield the cases to run, those with common numbers of tokens first."""
    for tokens in options.tokens or [8192, 1, 2048, 128, 65536]:
        for name, shape in SHAPES.items():
            if not options.models or name in options.models:
                for case in cases(shape, tokens, options.ranks or [16]):
                    if not options.ops or case.op.name in options.ops:
                        yield case


def _line(case: Case, rows: list[Timing]) -> str:
    times = [f"{r.contender} {r.direction[0]} {r.seconds * 1e6:.1f}" if r.seconds else f"{r.contender} -" for r in rows]
    return f"{case}: " + ", ".join(times)


def _check(options: Options) -> None:
    from fastlora.kernels import ops

    known = {"models": list(SHAPES), "ops": list(ops.__all__), "contenders": list(NAMES), "dtype": list(DTYPES)}
    for option, allowed in known.items():
        given = getattr(options, option)
        for name in [given] if isinstance(given, str) else given:
            if name not in allowed:
                raise UsageError(f"--{option} {name}: unknown; choose from {', '.join(allowed)}")
    if not torch.cuda.is_available():
        raise RunError("`fastlora bench kernels` needs a CUDA device, and torch.cuda.is_available() is False")
