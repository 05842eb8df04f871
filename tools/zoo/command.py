"""Implementation of `fastlora zoo`: train each architecture in each way in a process of its own, with a time limit."""

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

from fastlora.tools.errors import UsageError
from fastlora.tools.output import writing
from fastlora.tools.zoo.architectures import Architecture, architectures
from fastlora.tools.zoo.compare import DIFFERENT, FAILED, Result
from fastlora.tools.zoo.page import Row, counts, write_golden, write_page, write_ways
from fastlora.tools.zoo.ways import PLAIN, WAYS

Task = tuple[Architecture, str]
"""An architecture and the name of a way."""

RESULTS = "zoo.jsonl"
_PRELOADED = ["torch", "transformers", "peft", "fastlora", "fastlora.tools.zoo.compare"]


@dataclass(frozen=True)
class Options:
    """Options of `fastlora zoo`.

    Attributes:
        output: folder for the results.
        names: architectures, or auto classes for all of their types; empty for all.
        ways: names of ways, or "all"; empty for the plain one.
        jobs: processes at a time.
        seconds: time limit of a process.
        resume: whether to keep the results of an earlier run in the same folder.
        page, golden: files to write as well.
    """

    output: Path
    names: list[str] = field(default_factory=list)
    ways: list[str] = field(default_factory=list)
    jobs: int = 2
    seconds: float = 120.0
    resume: bool = True
    page: Path | None = None
    golden: Path | None = None


def run(options: Options, console: Console) -> bool:
    """Compare the architectures, and return whether none of them failed or differs.

    Raises:
        UsageError: for an unknown name, or a number out of range.
    """
    known = architectures()
    by_class: dict[str, list[str]] = {}
    for name, architecture in known.items():
        by_class.setdefault(architecture.auto_class, []).append(name)
    _check(options, {*known, *by_class})
    ways = list(WAYS) if "all" in options.ways else options.ways or [PLAIN.name]
    names = dict.fromkeys(each for name in options.names or known for each in by_class.get(name, [name]))
    keys = [(name, way) for way in ways for name in names]
    with writing(options.output):
        options.output.mkdir(parents=True, exist_ok=True)
        path = options.output / RESULTS
        rows = _read_results(path) if options.resume else {}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows.values()))
        tasks = [(known[name], way) for name, way in keys if (name, way) not in rows]
        for row in run_tasks(tasks, options.jobs, options.seconds):
            rows[row["name"], row["way"]] = row
            console.print(_line(row), markup=False, highlight=False, soft_wrap=True)
            with path.open("a") as file:
                file.write(json.dumps(row) + "\n")
        selected = [rows[key] for key in keys]
        if options.page is not None and ways == [PLAIN.name]:
            write_page(selected, options.page)
        elif options.page is not None:
            write_ways(selected, options.page, options.names)
        if options.golden is not None:
            write_golden(selected, options.golden)
    console.print(summary(selected))
    console.print(f"see {path}", markup=False, highlight=False)
    return not any(row["verdict"] in (DIFFERENT, FAILED) for row in selected)


def _check(options: Options, names: set[str]) -> None:
    for name in options.names:
        if name not in names:
            raise UsageError(f"{name}: no architecture of the installed transformers; `fastlora zoo --list` lists them")
    for name in options.ways:
        if name not in WAYS and name != "all":
            raise UsageError(f"--way {name}: unknown; choose from all, {', '.join(WAYS)}")
    if options.jobs < 1 or not options.seconds > 0:
        raise UsageError(f"--jobs {options.jobs}, --seconds {options.seconds:g}: both must be more than 0")


def run_tasks(tasks: Iterable[Task], jobs: int, seconds: float) -> Iterator[Row]:
    """Yield the result of each task when it is ready. Processes fork from a server that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    waiting = list(tasks)
    running: dict[Task, tuple[BaseProcess, Any, float]] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            task = waiting.pop(0)
            receiver, sender = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(target=_work, args=(*task, sender), daemon=True)
            process.start()
            sender.close()
            running[task] = (process, receiver, time.monotonic())
        for task, (process, receiver, started) in list(running.items()):
            row = _poll(task, process, receiver, time.monotonic() - started > seconds)
            if row is not None:
                del running[task]
                yield row
        time.sleep(0.02)


def _poll(task: Task, process: BaseProcess, receiver: Any, late: bool) -> Row | None:
    """Return the result of a process, or a failure if it died or is late; None while it runs."""
    row: Row | None = None
    name, way = str(task[0]), task[1]
    if receiver.poll():
        try:
            row = receiver.recv()
        except EOFError:
            process.join()
            row = asdict(Result(name, way, FAILED, f"the process ended with code {process.exitcode}"))
    elif late:
        row = asdict(Result(name, way, FAILED, "it took longer than the time limit"))
    if row is not None:
        process.kill()
        process.join()
    return row


def _work(architecture: Architecture, way: str, sender: Any) -> None:
    """Send the result of one task; runs in a process of its own, without the output of libraries."""
    import torch
    import transformers

    from fastlora.tools.zoo.compare import compare

    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.dup2(devnull, 2)
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    sender.send(compare(architecture, WAYS[way]))


def _read_results(path: Path) -> dict[tuple[str, str], Row]:
    """Read the results of an earlier run, except a last line that was cut off and those of another version."""
    rows: dict[tuple[str, str], Row] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.keys() == Result.__dataclass_fields__.keys():
            rows[row["name"], row["way"]] = row
    return rows


def _line(row: Row) -> str:
    sites = ", ".join(f"{family} {fused}/{seen}" for family, (seen, fused) in row["sites"].items())
    problem = f" ({row['problem']})" if row["problem"] else ""
    way = "" if row["way"] == PLAIN.name else f" ({row['way']})"
    return f"{row['name']}{way}: {row['verdict']}{problem} {sites}".rstrip()


def summary(rows: list[Row]) -> Table:
    """Return the table of how many architectures are equal and fused entirely, and of fused sites by family."""
    table = Table("", "total", "count", title=f"{len(rows)} architectures")
    for description, total, count in counts(rows):
        table.add_row(description, str(total), str(count))
    return table
