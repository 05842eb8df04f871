"""Writes what `fastlora zoo` has found: a page to read, and the part of it that must not change unseen."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from pathlib import Path
from typing import Any

from fastlora.tools.zoo.examine import EQUAL, UNBUILT, UNTRAINED
from fastlora.tools.zoo.kinds import LANGUAGE
from fastlora.tools.zoo.ways import WAYS

UNCOVERED = "which no rule covers"
Row = dict[str, Any]

FAMILIES = ("lora", "norm", "rotary", "glu", "loss")

_HEAD = """\
# Architectures

Measured on {date} on a CPU with {versions} by

```bash
fastlora zoo --page docs/results/coverage.md
```

Every causal language model that this transformers knows, every model that sees or hears and answers in words, and some
encoders, encoder-decoders and classifiers of texts, pictures and sounds. A tiny model with random float32 weights, made
by one shrinking rule, with LoRA on all linear layers but the output head, those of vision and audio towers included,
takes one step in evaluation mode, eager and compiled; pictures and sounds are noise. "Equal" means that the loss and
every gradient differ by rounding: by no more than 1e-5, or are no further from a float64 step than 1.25 times eager is,
in the median over eight batches if not in the first.

| | of | |
| --- | --- | --- |
{counts}

| what is trained | types | built and trained | equal | fused entirely |
| --- | --- | --- | --- | --- |
{classes}
"""


def trained(rows: list[Row]) -> list[Row]:
    """Those that could be built and that eager trains."""
    return [row for row in rows if row["verdict"] not in (UNBUILT, UNTRAINED)]


def counts(rows: list[Row]) -> list[tuple[str, int, int]]:
    """What is counted, of how many, and how many: types, and sites of each family."""
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
    """A line for each class of models."""
    of: dict[str, list[Row]] = {}
    for row in rows:
        of.setdefault(row["name"].partition(":")[2] or LANGUAGE, []).append(row)
    lines = []
    for name, named in of.items():
        numbers = [many for _, _, many in counts(named)[:3]]
        lines.append(f"| {name} | {len(named)} | {' | '.join(map(str, numbers))} |")
    return lines


def _conditions(rows: list[Row]) -> dict[str, str]:
    """What a page says of when and with what it was measured: results of several machines can be read together."""
    versions = " and ".join(dict.fromkeys(row["versions"] for row in rows))
    return {"date": datetime.date.today().isoformat(), "versions": versions}


def _problem(row: Row, most: int) -> str:
    """As the cell of a table."""
    return str(row["problem"]).replace("|", "/")[:most]


def write_page(rows: list[Row], path: Path) -> None:
    head = _HEAD.format(
        **_conditions(rows),
        counts="\n".join(f"| {what} | {of} | {many} |" for what, of, many in counts(rows)),
        classes="\n".join(_classes(rows)),
    )
    known = trained(rows)
    path.write_text("\n".join([head, *_by_type(known), *_left(known), *_others(rows)]) + "\n")


def _by_type(rows: list[Row]) -> list[str]:
    lines = [
        "## By type",
        "",
        "Sites fused of sites seen; graphs that were compiled, and how many reasons TorchDynamo had to break them; the",
        "largest relative difference of a gradient to eager's.",
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


def _left(rows: list[Row]) -> list[str]:
    """Why candidates stayed, and blocks ran as they were."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for reason in [*row["missed"], *(note for note in row["notes"] if "uncompiled" in note)]:
            reasons.setdefault(reason, []).append(row["name"])
    lines = ["", "## What is left, and why", "", "| reason | types |", "| --- | --- |"]
    return lines + [f"| {reason} | {', '.join(names)} |" for reason, names in sorted(reasons.items())]


def _others(rows: list[Row]) -> list[str]:
    problems = Counter(row["verdict"] for row in rows if row["verdict"] in (UNBUILT, UNTRAINED))
    lines = ["", "## Types without a tiny model", "", f"{sum(problems.values())} of them.", "", "| type | | problem |"]
    lines.append("| --- | --- | --- |")
    for row in rows:
        if row["verdict"] in problems:
            lines.append(f"| {row['name']} | {row['verdict']} | {_problem(row, 160)} |")
    return lines


def golden(row: Row) -> dict[str, Any]:
    """Return what must not change unseen of a row."""
    left = {why: count for why, count in row["missed"].items() if why.endswith(UNCOVERED)}
    kept = {key: row[key] for key in ("verdict", "graphs", "sites")}
    return kept | ({"uncovered": sum(left.values())} if left else {})


def write_golden(rows: list[Row], path: Path) -> None:
    """One line for each type that eager trains; `uncovered` are the sites of units that no rule is about."""
    lines = [f"{json.dumps(row['name'])}: {json.dumps(golden(row))}" for row in trained(rows)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


_WAYS_HEAD = """\
# Ways to train

Measured on {date} on a CPU with {versions} by

```bash
fastlora zoo {names}--way all --page docs/results/ways.md
```

Tiny models as in [coverage.md](coverage.md), each trained in every way. "Equal" is as there; where eager itself rounds
to bfloat16, it means that over eight batches the gradients are in the median no further from a float32 step than 1.25
times eager's. Not every model can be trained in every way: some cannot be built so, and some eager does not train.

| way | what it is | models | equal | sites fused | what is left, most often |
| --- | --- | --- | --- | --- | --- |
"""


def write_ways(rows: list[Row], path: Path, names: list[str]) -> None:
    """A line for each way, and one for each model and problem with it. `names` are those that were asked for."""
    head = _WAYS_HEAD.format(**_conditions(rows), names="".join(f"{name} " for name in names))
    lines = [
        _way_line(way, [row for row in rows if row["way"] == way]) for way in dict.fromkeys(r["way"] for r in rows)
    ]
    odd: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["verdict"] != EQUAL:
            odd.setdefault((row["name"], row["verdict"], _problem(row, 140)), []).append(row["way"])
    table = ["", "## What is not equal", "", "| model | | problem | ways |", "| --- | --- | --- | --- |"]
    for (name, verdict, problem), ways in odd.items():
        shown = "all" if len(ways) == len(lines) > 1 else ", ".join(ways)
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
    return f"| {way} | {WAYS[way].does} | {len(known)} | {equal} | {fused} of {seen} | {left} |"
