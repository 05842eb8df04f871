"""Results of the kernel benchmark: JSON, CSV tables, a plot, and the table to print."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.table import Table

from fastlora.tools.bench.accuracy import Accuracy
from fastlora.tools.bench.contenders import BARE_PRODUCT, FASTLORA
from fastlora.tools.bench.kernels import Timing
from fastlora.tools.bench.measure import Ceilings

Row = dict[str, Any]
SLOWER = 1.03
"""A contender counts as faster if fastlora takes more than this many times as long; smaller differences are noise."""


def environment(ceilings: Ceilings, dtype: torch.dtype) -> Row:
    """Return the conditions of a run: date, GPU, versions, dtype and peak rates."""
    import triton

    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "copy_bandwidth": ceilings.bandwidth,
        "product_rate": ceilings.rate,
    }


def timing_row(timing: Timing) -> Row:
    case = timing.case
    where = {"op": case.op.name, "model": case.model, "place": case.place, "tokens": case.tokens, "rank": case.rank}
    return {
        **where,
        "direction": timing.direction,
        "contender": timing.contender,
        "device_us": None if timing.seconds is None else timing.seconds * 1e6,
        "call_us": None if timing.host_seconds is None else timing.host_seconds * 1e6,
        "share_of_limit": timing.share,
        "extra_mib": None if timing.extra_bytes is None else timing.extra_bytes / 2**20,
        "problem": timing.problem,
    }


def accuracy_row(found: Accuracy) -> Row:
    case = found.case
    return {
        "op": case.op.name,
        "model": case.model,
        "place": case.place,
        "tokens": case.tokens,
        "dtype": str(found.dtype).removeprefix("torch."),
        "tensor": found.tensor,
        "error": found.error,
        "eager_error": found.eager_error,
        "passes": found.passes,
    }


def write(folder: Path, conditions: Row, timings: list[Row], accuracies: list[Row]) -> None:
    """Write timings.csv, accuracy.csv, results.json and, if anything was timed, shares.png."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("timings", timings), ("accuracy", accuracies)):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
    everything = {"conditions": conditions, "timings": timings, "accuracy": accuracies}
    (folder / "results.json").write_text(json.dumps(everything, indent=1))
    timed = [row for row in timings if row["device_us"] is not None]
    if timed:
        _plot(folder / "shares.png", conditions, timed)


def _plot(path: Path, conditions: Row, timings: list[Row]) -> None:
    """Plot the share of the limit over tokens, with a panel per op and pass and a line per contender. Values are means
    over models and places."""
    panels = list(dict.fromkeys((row["op"], row["direction"]) for row in timings))
    columns = 4
    num_lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3 * num_lines), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (op, direction) in zip(figure.subplots(num_lines, columns, squeeze=False).flat, panels, strict=False):
        rows = [r for r in timings if (r["op"], r["direction"]) == (op, direction)]
        for name in dict.fromkeys(r["contender"] for r in rows):
            points = _means([(r["tokens"], r["share_of_limit"]) for r in rows if r["contender"] == name])
            style = {"linewidth": 2.5, "color": "tab:blue"} if name == FASTLORA else {"linewidth": 1}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
        axes.set(title=f"{op}, {direction}", xscale="log", xlabel="tokens", ylabel="share of limit", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(f"{conditions['gpu']}, {conditions['dtype']}, {conditions['date']}")
    figure.savefig(path, dpi=110)


def _means(points: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    by_tokens: dict[int, list[float]] = {}
    for tokens, share in points:
        by_tokens.setdefault(tokens, []).append(share)
    return sorted((tokens, sum(shares) / len(shares)) for tokens, shares in by_tokens.items())


def with_ratios(timings: list[Row]) -> list[Row]:
    """Return fastlora's rows with two more fields: `ratios`, its time over each contender's, and `faster`, the names of
    faster contenders."""
    names = ("op", "model", "place", "tokens", "rank", "direction")
    groups: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in timings:
        groups.setdefault(tuple(row[n] for n in names), {})[row["contender"]] = row
    rows = []
    for group in groups.values():
        if group.get(FASTLORA, {}).get("device_us") is None:
            continue
        row = group.pop(FASTLORA)
        times = {name: other["device_us"] for name, other in group.items() if other["device_us"] is not None}
        ratios = {name: row["device_us"] / time for name, time in times.items()}
        faster = [name for name, ratio in ratios.items() if name != BARE_PRODUCT and ratio > SLOWER]
        rows.append({**row, "ratios": ratios, "faster": faster})
    return rows


def table(rows: list[Row]) -> Table:
    """Return the table of fastlora's times, share of the limit, extra memory, and time over that of each contender."""
    names = list(dict.fromkeys(name for row in rows for name in row["ratios"]))
    shown = Table(title="fastlora's time, and that time over each contender's (below 1: fastlora is faster)")
    for column in ("op", "model", "place", "tokens", "r", "pass", "us", "of limit", "MiB", *names):
        shown.add_column(column, justify="left" if column in ("op", "model", "place", "pass") else "right")
    for row in rows:
        ratios = [f"{row['ratios'][n]:.2f}" if n in row["ratios"] else "" for n in names]
        fixed = (row["op"], row["model"], row["place"], str(row["tokens"]), str(row["rank"] or ""), row["direction"])
        numbers = (f"{row['device_us']:.1f}", f"{row['share_of_limit']:.0%}", f"{row['extra_mib']:.0f}")
        shown.add_row(*fixed, *numbers, *ratios, style="red" if row["faster"] else None)
    return shown
