"""Pages with the results of `fastlora zoo`, and the file of results that tests compare with."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from pathlib import Path
from typing import Any

from fastlora.tools.zoo.architectures import CAUSAL_LM
from fastlora.tools.zoo.compare import EQUAL, UNBUILT, UNTRAINED
from fastlora.tools.zoo.ways import WAYS

NO_RULE = "which no rule covers"
"""End of the reason for a candidate that is recognized, but that no rule is meant to match."""
FAMILIES = ("lora", "norm", "rotary", "glu", "loss")

Row = dict[str, Any]
"""The fields of a `Result` of `compare.py`."""

_HEAD = """\
# Architectures

Measured on {date} on a CPU with {versions} by

```bash
fastlora zoo --page docs/results/coverage.md
```

All causal language models, image-text-to-text models, speech and multimodal models of this version of transformers, and
some encoders, encoder-decoders and classifiers of text, images and audio. Each type is a tiny model with random float32
weights and LoRA on all linear layers except the output head, vision and audio towers included. It takes one training
step in evaluation mode, eager and compiled, on random tokens, images and audio. "Equal" means that the loss and every
gradient differ from eager's by at most 1e-5, or that their error against a float64 step is at most 1.25 times eager's,
in the first batch or in the median over eight.

| | of | |
| --- | --- | --- |
{counts}

| auto class | types | built and trained | equal | fused entirely |
| --- | --- | --- | --- | --- |
{classes}
"""


def trained(rows: list[Row]) -> list[Row]:
    """Return the rows of models that can be built and trained eagerly."""
    return [row for row in rows if row["verdict"] not in (UNBUILT, UNTRAINED)]


def counts(rows: list[Row]) -> list[tuple[str, int, int]]:
    """Return the numbers of types by verdict, and of fused sites by family, as (description, total, count)."""
    known = trained(rows)
    equal, whole = sum(row["verdict"] == EQUAL for row in known), sum(not row["missed"] for row in known)
    found = [
        ("types that can be built tiny and that eager trains", len(rows), len(known)),
        ("of them equal when compiled", len(known), equal),
        ("of them with every candidate fused", len(known), whole),
    ]
    for family in FAMILIES:
        seen, fused = (sum(row["sites"].get(family, [0, 0])[i] for row in known) for i in (0, 1))
        found.append((f"{family} sites fused", seen, fused))
    return found


def _classes(rows: list[Row]) -> list[str]:
    """Return a table row for each auto class."""
    by_class: dict[str, list[Row]] = {}
    for row in rows:
        by_class.setdefault(row["name"].partition(":")[2] or CAUSAL_LM, []).append(row)
    lines = []
    for name, members in by_class.items():
        numbers = [count for _, _, count in counts(members)[:3]]
        lines.append(f"| {name} | {len(members)} | {' | '.join(map(str, numbers))} |")
    return lines


def _conditions(rows: list[Row]) -> dict[str, str]:
    """Return the date and the versions of the libraries; results may have been measured with several."""
    versions = " and ".join(dict.fromkeys(row["versions"] for row in rows))
    return {"date": datetime.date.today().isoformat(), "versions": versions}


def _problem(row: Row, length: int) -> str:
    """Return the problem as a table cell of at most this length."""
    return str(row["problem"]).replace("|", "/")[:length]


def write_page(rows: list[Row], path: Path) -> None:
    """Write the page on architectures, trained in the plain way."""
    head = _HEAD.format(
        **_conditions(rows),
        counts="\n".join(f"| {what} | {total} | {count} |" for what, total, count in counts(rows)),
        classes="\n".join(_classes(rows)),
    )
    known = trained(rows)
    path.write_text("\n".join([head, *_by_type(known), *_not_fused(known), *_not_trained(rows)]) + "\n")


def _by_type(rows: list[Row]) -> list[str]:
    lines = [
        "## By type",
        "",
        "Fused sites of all sites by family, the number of compiled graphs and of graph breaks, and the largest",
        "relative difference of a gradient from eager's.",
        "",
        f"| type | compiled | {' | '.join(FAMILIES)} | graphs | breaks | gradients |",
        f"| --- | --- |{' --- |' * (len(FAMILIES) + 3)}",
    ]
    for row in rows:
        sites = [f"{row['sites'][f][1]}/{row['sites'][f][0]}" if f in row["sites"] else "" for f in FAMILIES]
        difference = row["gradient_difference"]
        shown = "" if difference is None else f"{difference:.0e}"
        cells = [row["name"], row["verdict"], *sites, row["graphs"], row["breaks"] or "", shown]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def _not_fused(rows: list[Row]) -> list[str]:
    """Return the table of reasons why candidates were not fused and why blocks ran uncompiled."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for reason in [*row["missed"], *(note for note in row["notes"] if "uncompiled" in note)]:
            reasons.setdefault(reason, []).append(row["name"])
    lines = ["", "## What is not fused, and why", "", "| reason | types |", "| --- | --- |"]
    return lines + [f"| {reason} | {', '.join(names)} |" for reason, names in sorted(reasons.items())]


def _not_trained(rows: list[Row]) -> list[str]:
    left_out = [row for row in rows if row["verdict"] in (UNBUILT, UNTRAINED)]
    lines = ["", "## Types without a tiny model", "", f"{len(left_out)} types.", "", "| type | | problem |"]
    lines.append("| --- | --- | --- |")
    return lines + [f"| {row['name']} | {row['verdict']} | {_problem(row, 160)} |" for row in left_out]


def golden(row: Row) -> dict[str, Any]:
    """Return the part of a row that tests compare; `uncovered` counts the candidates that no rule is meant to match."""
    uncovered = sum(count for reason, count in row["missed"].items() if reason.endswith(NO_RULE))
    kept = {key: row[key] for key in ("verdict", "graphs", "sites")}
    return kept | ({"uncovered": uncovered} if uncovered else {})


def write_golden(rows: list[Row], path: Path) -> None:
    """Write a JSON object with one line for each type that trains eagerly."""
    lines = [f"{json.dumps(row['name'])}: {json.dumps(golden(row))}" for row in trained(rows)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


_WAYS_HEAD = """\
# Ways to train

Measured on {date} on a CPU with {versions} by

```bash
fastlora zoo {names}--way all --page docs/results/ways.md
```

The tiny models of [coverage.md](coverage.md), each trained in every way. "Equal" is defined there; in lower precisions
it means that over eight batches, the median error of the gradients against a float32 step is at most 1.25 times
eager's. A model that cannot be built or trained eagerly in a way is not counted in its row.

| way | what it is | models | equal | sites fused | most frequent reasons for the rest |
| --- | --- | --- | --- | --- | --- |
"""


def write_ways(rows: list[Row], path: Path, names: list[str]) -> None:
    """Write the page on ways to train: a row for each way, and one for each problem of a model. `names` are the
    arguments of the command."""
    head = _WAYS_HEAD.format(**_conditions(rows), names="".join(f"{name} " for name in names))
    ways = dict.fromkeys(row["way"] for row in rows)
    lines = [_way_line(way, [row for row in rows if row["way"] == way]) for way in ways]
    problems: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["verdict"] != EQUAL:
            problems.setdefault((row["name"], row["verdict"], _problem(row, 140)), []).append(row["way"])
    table = ["", "## What is not equal", "", "| model | | problem | ways |", "| --- | --- | --- | --- |"]
    for (name, verdict, problem), affected in problems.items():
        shown = "all" if len(affected) == len(ways) > 1 else ", ".join(affected)
        table.append(f"| {name} | {verdict} | {problem} | {shown} |")
    path.write_text(head + "\n".join([*lines, *table]) + "\n")


def _way_line(way: str, rows: list[Row]) -> str:
    known = trained(rows)
    seen, fused = (sum(count[i] for row in known for count in row["sites"].values()) for i in (0, 1))
    reasons: Counter[str] = Counter()
    for row in known:
        reasons.update(row["missed"])
    left = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(2)).replace("|", "/")
    equal = sum(row["verdict"] == EQUAL for row in known)
    return f"| {way} | {WAYS[way].description} | {len(known)} | {equal} | {fused} of {seen} | {left} |"
