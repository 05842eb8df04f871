"""Results of the step benchmark: a table to print, JSON, CSV, and a plot of speed against memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.markup import escape
from rich.table import Table

from fastlora.tools.bench.step.contenders import EAGER, FASTLORA
from fastlora.tools.bench.step.profile import with_limits
from fastlora.tools.summary import hardware, to_json_value, versions

Row = dict[str, Any]
RANKED = "ranked"
_PEERS = ("liger-kernel", "unsloth", "unsloth_zoo", "bitsandbytes", "xformers")
_NOT_IN_CSV = ("all_seconds", "described", "tensor_errors", "profile")
_CAPTION = (
    "extra: beyond weights, optimizer states and batches; first step: with empty compile caches;\n"
    "error: error of the first step's gradients against float32, relative to eager's"
)
_GIB = 2**30
_SMALL = 0.002
"""Kernels below this share of a step are not listed."""


def environment() -> Row:
    """Return the conditions of a run: date, hardware and versions."""
    found = versions()
    for package in _PEERS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"date": datetime.now(timezone.utc).date().isoformat(), **hardware(), "versions": found}


def rank(rows: Iterable[Row]) -> list[Row]:
    """Return rows of one batch, the fastest first, with rank and speed relative to eager. Unranked rows are last."""
    rows = list(rows)
    passed = sorted((row for row in rows if row["status"] == RANKED), key=lambda row: row["seconds"])
    eager = next((row["seconds"] for row in passed if row["contender"] == EAGER), None)
    for position, row in enumerate(passed, 1):
        row |= {"rank": position, "times_eager": eager / row["seconds"] if eager else None}
    return passed + [row for row in rows if row["status"] != RANKED]


def table(rows: list[Row], title: str) -> Table:
    """Return the table for one batch, given the rows of `rank`."""
    shown = Table(title=title, caption=_CAPTION)
    shown.add_column("")
    shown.add_column("contender", no_wrap=True)
    for heading in ("ms", "tokens/s", "x eager", "of limit", "extra GiB", "peak GiB", "first step s", "loss", "error"):
        shown.add_column(heading, justify="right")
    for row in rows:
        numbers = [
            _formatted(row, "seconds", "{:.2f}", 1e3),
            _formatted(row, "tokens_per_second", "{:,.0f}"),
            _formatted(row, "times_eager", "{:.2f}"),
            _formatted(row, "share_of_limit", "{:.0%}"),
            _formatted(row, "extra_bytes", "{:.2f}", 1 / _GIB),
            _formatted(row, "peak_bytes", "{:.2f}", 1 / _GIB),
            _formatted(row, "first_step_seconds", "{:.1f}"),
            _formatted(row, "loss", "{:.4f}"),
            _formatted(row, "times_eager_error", "{:.2f}"),
        ]
        style = None if row["status"] == RANKED else "red"
        shown.add_row(str(row.get("rank", "-")), row["contender"], *numbers, style=style)
    return shown


def profile_table(row: Row, limits: dict[str, float]) -> Table:
    """Return the table of a contender's GPU time by kind of work, with the least time of each."""
    kinds = row["profile"]
    total = sum(sum(parts.values()) for parts in kinds.values())
    shown = Table(title=f"{row['contender']}: GPU time of a step", caption=f"{total * 1e3:.2f} ms in total")
    shown.add_column("work")
    for heading in ("ms", "share", "limit ms", "x limit"):
        shown.add_column(heading, justify="right")
    for kind, seconds, limit in with_limits(kinds, limits):
        limited = [f"{limit * 1e3:.2f}", f"{seconds / limit:.2f}"] if limit else ["-", "-"]
        shown.add_row(kind, f"{seconds * 1e3:.2f}", f"{seconds / total:.1%}", *limited)
        for name, part in kinds[kind].items():
            if len(kinds[kind]) > 1 and part > _SMALL * total:
                shown.add_row(f"  {name[:60]}", f"{part * 1e3:.2f}", f"{part / total:.1%}", "", "", style="dim")
    return shown


def problems(rows: list[Row]) -> list[str]:
    """Return a line of rich markup for each contender that is not ranked."""
    return [f"[red]{row['contender']}[/] {row['status']}: {escape(row['problem'])}" for row in rows if row["problem"]]


def _formatted(row: Row, name: str, form: str, factor: float = 1) -> str:
    value = row.get(name)
    return "-" if value is None else form.format(value * factor)


def write(folder: Path, conditions: Row, rows: list[Row]) -> list[str]:
    """Write results.json, steps.csv and, if memory was measured, frontier.png; return their names."""
    everything = to_json_value({"conditions": conditions, "steps": rows})
    (folder / "results.json").write_text(json.dumps(everything, indent=1, allow_nan=False) + "\n")
    columns = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in _NOT_IN_CSV]
    with open(folder / "steps.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    points = [row for row in rows if row["status"] == RANKED and row["extra_bytes"] is not None]
    if points:
        plot(folder / "frontier.png", conditions, points)
    return ["results.json", "steps.csv", *(["frontier.png"] if points else [])]


def plot(path: Path, conditions: Row, rows: list[Row]) -> None:
    """Plot tokens per second over extra memory, with a panel per batch and a line through the Pareto frontier."""
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    figure = Figure(figsize=(7 * len(batches), 5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False).flat, batches, strict=True):
        points = [row for row in rows if row["batch"] == batch]
        for row in points:
            color = "tab:blue" if row["contender"].split("-")[0] == FASTLORA else "tab:gray"
            point = (row["extra_bytes"] / _GIB, row["tokens_per_second"])
            axes.scatter(*point, color=color)
            axes.annotate(row["contender"], point, xytext=(4, 4), textcoords="offset points", fontsize=8)
        best = [(row["extra_bytes"] / _GIB, row["tokens_per_second"]) for row in frontier(points)]
        axes.plot(*zip(*best, strict=True), color="tab:blue", linewidth=1, alpha=0.5)
        if limit := points[0].get("limit_seconds"):
            rate = points[0]["rows"] * points[0]["length"] / limit
            axes.axhline(rate, linestyle="--", color="black", linewidth=1, label="limit")
            axes.legend()
        axes.set(title=f"{batch} tokens", xlabel="GiB beyond model and optimizer", ylabel="tokens/s")
        axes.set(xlim=(0, None), ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.suptitle(f"{conditions['model']}, {conditions['layers']} layers, LoRA, {conditions['device']}")
    figure.savefig(path, dpi=130)


def frontier(rows: list[Row]) -> list[Row]:
    """Return the rows that no other row beats in both speed and memory, the smallest memory first."""
    best: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["extra_bytes"], row["seconds"])):
        if not best or row["seconds"] < best[-1]["seconds"]:
            best.append(row)
    return best
