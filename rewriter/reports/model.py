"""The report that `explain` and `report` return: what was fused, what was not and why."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fastlora.errors import FastLoRAError


@dataclass
class Coverage:
    """Candidates of one op family: how many were seen, and how many a fused op replaced."""

    seen: int = 0
    fused: int = 0


@dataclass(frozen=True)
class Site:
    """A fused op.

    Attributes:
        op, rule: the semantic op, and the rule that found it, with its source line.
        where: module path and source line of the model's code.
        nodes: how many graph nodes it replaced.
        bytes_saved: bytes of intermediate tensors that are no longer computed (symbolic sizes by their hint).
        count: how many modules run this graph: one compiled block serves all layers that share its code.
    """

    op: str
    rule: str
    where: str
    nodes: int
    bytes_saved: int
    count: int = 1


@dataclass(frozen=True)
class Miss:
    """A candidate that is not fused, and why; `op` is its family."""

    op: str
    rule: str
    where: str
    reason: str
    count: int = 1


@dataclass
class Seconds:
    """Compile time: tracing by TorchDynamo, matching and rewriting, and lowering."""

    trace: float = 0.0
    match: float = 0.0
    lower: float = 0.0


@dataclass
class Report:
    """How a model was compiled. `print(report)` is for people, `to_json` and `to_html` for tools.

    Attributes:
        coverage: per op family (`lora`, `norm`, `rotary`, `glu`, `loss`), candidates seen and fused.
        fused, missed: every site, with its place in the model's source.
        graphs: how many graphs were traced.
        breaks: the reasons for graph breaks.
        notes: further notes on how the model runs.
        code: each rewritten graph as readable Python, by the name of its region.
        programs: the same graphs as Python files that run; see `program`.
    """

    coverage: dict[str, Coverage] = field(default_factory=dict)
    fused: list[Site] = field(default_factory=list)
    missed: list[Miss] = field(default_factory=list)
    graphs: int = 0
    breaks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: Seconds = field(default_factory=Seconds)
    code: dict[str, str] = field(default_factory=dict, repr=False)
    programs: dict[str, str] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        spent = self.seconds
        lines = [
            f"fastlora: {self.graphs} graphs, {len(self.breaks)} graph breaks, "
            f"traced in {spent.trace:.2f} s, matched in {spent.match:.3f} s, lowered in {spent.lower:.2f} s",
            f"  {'family':<10}{'seen':>6}{'fused':>7}",
            *(f"  {name:<10}{c.seen:>6}{c.fused:>7}" for name, c in sorted(self.coverage.items()) if c.seen),
        ]
        if self.fused:
            lines.append("fused")
            lines += [f"  {site.op:<22}{_times(site.count)} {site.where}" for site in self.fused]
        if self.missed:
            lines.append("not fused")
            lines += [
                f"  {miss.op:<10}{_times(miss.count)} {miss.where}\n             {miss.reason}" for miss in self.missed
            ]
        lines += [f"graph break: {reason}" for reason in self.breaks]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Return the report as a JSON object with the field names of this class, without `programs`."""
        return json.dumps({name: value for name, value in asdict(self).items() if name != "programs"}, indent=2)

    def program(self, region: str | None = None) -> str:
        """Return a rewritten graph as a Python file that runs it, forward and backward, on random inputs.

        Args:
            region: a name in `code`; None for the first.

        Raises:
            FastLoRAError: if there is no graph of that name.
        """
        name = next(iter(self.programs), None) if region is None else region
        if name not in self.programs:
            known = ", ".join(map(repr, self.programs)) or "none yet: run a training step first"
            raise FastLoRAError(f"region must be the name of a compiled graph; got {region!r}. There are: {known}")
        return self.programs[name]

    def to_html(self, path: str | Path) -> None:
        """Write the report as one self-contained HTML page."""
        Path(path).write_text(_page(self), encoding="utf-8")


def _times(count: int) -> str:
    return f"x{count:<3}"


def _page(report: Report) -> str:
    coverage = ((name, c.seen, c.fused) for name, c in sorted(report.coverage.items()))
    parts = [
        "<!doctype html><meta charset='utf-8'><title>fastlora report</title>",
        "<style>body{font:15px system-ui;margin:2em auto;max-width:70em}td,th{text-align:left;padding:.2em 1em .2em 0}"
        "pre{overflow:auto;background:#f6f6f6;padding:1em}</style>",
        f"<h1>fastlora report</h1><p>{report.graphs} graphs, {len(report.breaks)} graph breaks, "
        f"matched in {report.seconds.match:.3f} s</p>",
        _table(("family", "seen", "fused"), coverage),
        "<h2>Fused</h2>",
        _table(("op", "modules", "where", "nodes", "bytes saved"), _rows(report.fused)),
        "<h2>Not fused</h2>",
        _table(("family", "modules", "where", "reason"), ((m.op, m.count, m.where, m.reason) for m in report.missed)),
        *(f"<p>Graph break: {html.escape(reason)}</p>" for reason in report.breaks),
        *(f"<p>{html.escape(note)}</p>" for note in report.notes),
        *(f"<h2>{html.escape(name)}</h2><pre>{html.escape(code)}</pre>" for name, code in report.code.items()),
    ]
    return "\n".join(parts)


def _rows(sites: Iterable[Site]) -> Iterable[tuple[object, ...]]:
    return ((s.op, s.count, s.where, s.nodes, s.bytes_saved) for s in sites)


def _table(head: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    def row(cells: Iterable[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row(head, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
