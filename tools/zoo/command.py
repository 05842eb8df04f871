"""Runs `fastlora zoo`: each architecture, in each way that is asked for, in a process of its own with a time limit, and
counts what came of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fastlora.tools.output import writing
from fastlora.tools.problems import UsageError
from fastlora.tools.zoo.examine import DIFFERENT, FAILED, Examined
from fastlora.tools.zoo.kinds import Kind, kinds
from fastlora.tools.zoo.page import counts, write_golden, write_page, write_ways
from fastlora.tools.zoo.ways import PLAIN, WAYS

Row = dict[str, Any]
Errand = tuple[Kind, str]
"""An architecture, and the name of a way."""

RESULTS = "zoo.jsonl"
_PRELOADED = ["torch", "transformers", "peft", "fastlora", "fastlora.tools.zoo.examine"]


@dataclass(frozen=True)
class Visit:
    """What to look at: no names mean everything, that of an auto class all of its types; no ways the plain one, and
    "all" all of them. `resume` keeps what an earlier run has found in the same folder, `page` and `golden` are files to
    write as well."""

    output: Path
    names: list[str] = field(default_factory=list)
    ways: list[str] = field(default_factory=list)
    jobs: int = 2
    seconds: float = 120.0
    resume: bool = True
    page: Path | None = None
    golden: Path | None = None


def run(visit: Visit, console: Console) -> bool:
    """Examines architectures; False if one is different compiled, or fails.

    Raises:
        UsageError: for an unknown name, or numbers that make no sense.
    """
    known = kinds()
    of: dict[str, list[str]] = {}
    for name, kind in known.items():
        of.setdefault(kind.auto_class, []).append(name)
    for name in visit.names:
        if name not in known and name not in of:
            raise UsageError(f"{name}: no architecture of the installed transformers; `fastlora zoo --list` lists them")
    for name in visit.ways:
        if name not in WAYS and name != "all":
            raise UsageError(f"--way {name}: unknown; choose from all, {', '.join(WAYS)}")
    if visit.jobs < 1 or not visit.seconds > 0:
        raise UsageError(f"--jobs {visit.jobs}, --seconds {visit.seconds:g}: both must be more than 0")
    ways = list(WAYS) if "all" in visit.ways else visit.ways or [PLAIN.name]
    named = [each for name in visit.names or known for each in of.get(name, [name])]
    asked = [(name, way) for way in ways for name in dict.fromkeys(named)]
    with writing(visit.output):
        visit.output.mkdir(parents=True, exist_ok=True)
        path = visit.output / RESULTS
        rows = _earlier(path) if visit.resume else {}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
        errands = [(known[name], way) for name, way in asked if (name, way) not in rows]
        for row in examined(errands, visit.jobs, visit.seconds):
            rows[row["name"], row["way"]] = row
            console.print(_line(row), markup=False, highlight=False, soft_wrap=True)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        chosen = [rows[errand] for errand in asked]
        if visit.page is not None and ways == [PLAIN.name]:
            write_page(chosen, visit.page)
        elif visit.page is not None:
            write_ways(chosen, visit.page, visit.names)
        if visit.golden is not None:
            write_golden(chosen, visit.golden)
    console.print(summary(chosen))
    console.print(f"see {path}", markup=False, highlight=False)
    return not any(row["verdict"] in (DIFFERENT, FAILED) for row in chosen)


def examined(asked: Iterable[Errand], jobs: int, seconds: float) -> Iterator[Row]:
    """The rows of errands as they come in. Processes fork from a server that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    waiting = list(asked)
    running: dict[Errand, tuple[BaseProcess, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            errand = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(target=_work, args=(*errand, sender), daemon=True)
            process.start()
            sender.close()
            running[errand] = (process, receiver, time.monotonic())
        for errand, (process, receiver, started) in list(running.items()):
            row = _received(errand, process, receiver, time.monotonic() - started > seconds)
            if row is not None:
                del running[errand]
                yield row
        time.sleep(0.02)


def _received(errand: Errand, process: BaseProcess, receiver: Any, late: bool) -> Row | None:
    """What a process has found, or how it ended; None while it runs."""
    row: Row | None = None
    name, way = str(errand[0]), errand[1]
    if receiver.poll():
        try:
            row = receiver.recv()
        except EOFError:
            process.join()
            row = asdict(Examined(name, way, FAILED, f"the process ended with code {process.exitcode}"))
    elif late:
        row = asdict(Examined(name, way, FAILED, "it took longer than the time limit"))
    if row is not None:
        process.kill()
        process.join()
    return row


def _work(kind: Kind, way: str, sender: Any) -> None:
    """What a process does; what libraries print on the way is no news."""
    import torch
    import transformers

    from fastlora.tools.zoo.examine import examine

    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    sender.send(examine(kind, WAYS[way]))


def _earlier(path: Path) -> dict[tuple[str, str], Row]:
    """What an earlier run has written, but for a last line that was cut off."""
    rows: dict[tuple[str, str], Row] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.keys() == Examined.__dataclass_fields__.keys():  # and not of another version of this
            rows[row["name"], row["way"]] = row
    return rows


def _line(row: Row) -> str:
    sites = ", ".join(f"{family} {fused}/{seen}" for family, (seen, fused) in row["sites"].items())
    problem = f" ({row['problem']})" if row["problem"] else ""
    way = "" if row["way"] == PLAIN.name else f" ({row['way']})"
    return f"{row['name']}{way}: {row['verdict']}{problem} {sites}".rstrip()


def summary(rows: list[Row]) -> Table:
    """How many architectures are equal and fused entirely, and how many sites of each family were fused."""
    table = Table("of", "in all", "so many", title=f"{len(rows)} architectures")
    for what, of, many in counts(rows):
        table.add_row(what, str(of), str(many))
    return table
