"""Implementation of `fastlora bench page`: the page of kernel benchmarks."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastlora.tools.bench.results import SLOWER, with_ratios
from fastlora.tools.bench.targets import MEASURES, TARGETS
from fastlora.tools.errors import UsageError

Row = dict[str, Any]

_HEAD = """\
# Kernel benchmarks

Measured on {date} on one {gpu} (compute capability {capability}, torch {torch}, triton {triton}) in {dtype}, by
`fastlora bench kernels`. "us" is GPU time: the median of several replays of a CUDA graph, on data that does not fit in
the caches, and the better of two measurements. "call us" is the time of one call from Python, launches included. The
limit of an op is the larger of its floating-point operations over {product_rate:.0f} TFLOP/s and its bytes, each
counted once, over {copy_bandwidth:.2f} TB/s. These rates are those of a product of 8192 x 8192 matrices and of a copy
of 1 GiB in the same run. Only cases whose error against float64 is at most 1.25 times eager's plus one rounding are
timed.
"""


def write(paths: list[Path], output: Path, notes: Path | None = None) -> None:
    """Write the page of one or several runs.

    Args:
        paths: results.json files of runs with the same GPU, versions and dtype; runs without times may have another
            dtype.
        output: file for the page.
        notes: a Markdown file to put in front of the tables.

    Raises:
        UsageError: for a file that is not a result, or runs under different conditions.
    """
    runs = []
    for path in paths:
        try:
            runs.append(json.loads(path.read_text()))
            runs[-1]["conditions"], runs[-1]["timings"], runs[-1]["accuracy"]
        except (OSError, ValueError, KeyError, TypeError) as problem:
            raise UsageError(f"{path}: not results of `fastlora bench kernels` ({type(problem).__name__})") from problem
    first = next((run for run in runs if run["timings"]), runs[0])["conditions"]
    for path, run in zip(paths, runs, strict=True):
        for name in ("gpu", "torch", "triton", *(["dtype"] if run["timings"] else [])):
            if run["conditions"][name] != first[name]:
                raise UsageError(
                    f"{path}: its {name} is {run['conditions'][name]}, but that of the other runs is {first[name]}"
                )
    rows = {name: [row for run in runs for row in run[name]] for name in ("timings", "accuracy")}
    output.write_text(page({"conditions": first, **rows}, notes.read_text() if notes else ""))


def page(results: Row, notes: str = "") -> str:
    """Return the page, in Markdown."""
    conditions, rows = results["conditions"], with_ratios(results["timings"])
    head = _HEAD.format(
        **{
            **conditions,
            "product_rate": conditions["product_rate"] / 1e12,
            "copy_bandwidth": conditions["copy_bandwidth"] / 1e12,
        }
    )
    sections = [head, notes, _targets(rows), _slower(rows), _times(rows), _errors(results["accuracy"])]
    return "\n".join(section for section in sections if section)


def table(titles: list[str], rows: Iterable[list[str]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _where(row: Row) -> list[str]:
    rank = f", r{row['rank']}" if row["rank"] else ""
    return [f"`{row['op']}`", f"{row['model']}, {row['place']}{rank}", f"{row['tokens']:,}", row["direction"]]


def _targets(rows: list[Row]) -> str:
    lines = []
    for target in TARGETS:
        for row in filter(target.applies_to, rows):
            measure = MEASURES[target.measure]
            verdict = "reached" if target.is_met(row) else "**missed**"
            bound = ("≥ " if measure.more_is_better else "≤ ") + measure.form.format(target.bound)
            lines.append([*_where(row), target.measure, bound, measure.form.format(measure.read(row)), verdict])
    titles = ["op", "where", "tokens", "pass", "measure", "target", "measured", ""]
    return "## Targets\n\n" + table(titles, lines)


def _slower(rows: list[Row]) -> str:
    lines = [
        [*_where(row), f"{row['device_us']:.1f}", ", ".join(f"{n} ({row['ratios'][n]:.2f})" for n in row["faster"])]
        for row in rows
        if row["faster"]
    ]
    text = "## Where fastlora is slower\n\n"
    text += f"All cases in which a contender took less than 1/{SLOWER} of fastlora's time.\n\n"
    titles = ["op", "where", "tokens", "pass", "us", "faster (our time / theirs)"]
    return text + (table(titles, lines) if lines else "None.\n")


def _times(rows: list[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    lines = [
        [
            *_where(row),
            f"{row['device_us']:.1f}",
            f"{row['call_us']:.0f}",
            f"{row['share_of_limit']:.0%}",
            f"{row['extra_mib']:.0f}",
            *(f"{row['ratios'][n]:.2f}" if n in row["ratios"] else "" for n in names),
        ]
        for row in rows
    ]
    titles = ["op", "where", "tokens", "pass", "us", "call us", "of limit", "extra MiB", *names]
    return (
        "## All times\n\nThe last columns are fastlora's time over each contender's; below 1, fastlora is faster.\n\n"
        + table(titles, lines)
    )


def _errors(accuracies: list[Row]) -> str:
    """Return the largest ratio of the error to eager's for each op, dtype and tensor, over all cases."""
    worst: dict[tuple[str, str, str], Row] = {}
    for row in accuracies:
        key = (row["op"], row["dtype"], row["tensor"].partition("[")[0])
        if key not in worst or _error_ratio(row) > _error_ratio(worst[key]):
            worst[key] = row
    lines = [
        [f"`{op}`", dtype, tensor, f"{row['error']:.2e}", f"{row['eager_error']:.2e}", f"{_error_ratio(row):.2f}"]
        for (op, dtype, tensor), row in sorted(worst.items())
    ]
    text = "## Errors against float64\n\n"
    text += "Relative root mean square errors; for each tensor, the case with the largest ratio.\n\n"
    return text + table(["op", "dtype", "tensor", "fastlora", "eager", "ratio"], lines)


def _error_ratio(row: Row) -> float:
    return row["error"] / max(row["eager_error"], 1e-30)
