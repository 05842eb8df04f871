"""Collecting the report of a session from the graphs that serve its model."""

from __future__ import annotations

from collections import Counter

from fastlora.compat.dynamo import graph_breaks
from fastlora.frontend.session import RECOMPILE_LIMIT, CompiledGraph, Session
from fastlora.reports.from_rewrite import misses, sites
from fastlora.reports.model import Coverage, Miss, Report, Site


def collect(session: Session) -> Report:
    """Return the report so far. Of a region that was traced several times, the last graph counts."""
    report = Report(graphs=len(session.graphs), seconds=session.seconds, notes=list(session.notes))
    regions: dict[int, list[str]] = {}
    for (region, _), graph in session.serving.items():
        regions.setdefault(id(graph), []).append(region)
    for graph in session.graphs:
        if id(graph) in regions:
            _add_graph(report, graph, regions[id(graph)])
    _add_uncompiled(report, session)
    _add_loss(report, session)
    _add_notes(report, session)
    return report


def unfused_loss_miss(session: Session, reason: str) -> Miss:
    """Return the `Miss` for a head whose loss is not fused."""
    return Miss("loss", "deferred logits", session.head or "", reason)


def _add_graph(report: Report, graph: CompiledGraph, regions: list[str]) -> None:
    count, name = len(regions), _common_name(regions)
    for rewritten in graph.rewrites:
        claimed = rewritten.claimed()
        for family, anchors in rewritten.anchors.items():
            coverage = report.coverage.setdefault(family, Coverage())
            coverage.seen += count * len(anchors)
            coverage.fused += count * sum(anchor in claimed for anchor in anchors)
        report.fused += sites(rewritten, name, count)
        report.missed += misses(rewritten, name, count)
    key = name if name not in report.code else f"{name} ({len(report.code)})"
    report.code[key] = graph.gm.print_readable(print_output=False)
    report.programs[key] = graph.program


def _add_uncompiled(report: Report, session: Session) -> None:
    """Count the candidates of regions that run uncompiled, using the graph of another region of the same class."""
    for region, module_class in session.uncompiled.items():
        same_class = next(graph for graph in reversed(session.graphs) if graph.module_class is module_class)
        for family, anchors in ((f, a) for rewritten in same_class.rewrites for f, a in rewritten.anchors.items() if a):
            report.coverage.setdefault(family, Coverage()).seen += len(anchors)
            reason = f"the module ran uncompiled: {RECOMPILE_LIMIT}"
            report.missed.append(Miss(family, "", region, reason, len(anchors)))


def _add_loss(report: Report, session: Session) -> None:
    """Count the loss of deferred logits, which is in no graph."""
    if session.head is None:
        return
    coverage = report.coverage.setdefault("loss", Coverage())
    if not session.deferral_stats.deferred:
        if session.head_problem is not None and not coverage.seen and session.executions:
            coverage.seen += 1
            report.missed.append(unfused_loss_miss(session, session.head_problem))
        return
    coverage.seen += 1
    if session.deferral_stats.fused:
        coverage.fused += 1
        report.fused.append(Site("linear_cross_entropy", "deferred logits", session.head, 2, 0))
    elif session.deferral_stats.materialized:
        lines = ", ".join(session.deferral_stats.materialized)
        report.missed.append(unfused_loss_miss(session, f"the logits themselves were used by {lines}"))
    else:
        report.missed.append(unfused_loss_miss(session, "no cross-entropy of the logits was computed"))
    for line, count in session.deferral_stats.materialized.items():
        report.notes.append(f"logits were materialized {count} times, by {line}")


def _add_notes(report: Report, session: Session) -> None:
    captured = sum(graph.replayer.captured for graph in session.graphs if graph.replayer is not None)
    summary = session.budget.summary() if session.budget is not None else None
    report.notes += [] if summary is None else [summary]
    report.notes += [f"captured {captured} CUDA graphs of regions"] if captured else []
    breaks: Counter[str] = Counter()
    for reason, count in (graph_breaks() - session.breaks_before).items():
        breaks[_in_one_line(reason)] += count
    report.breaks = list(breaks)
    report.notes += [f"{count} calls ran uncompiled: {reason}" for reason, count in session.bypassed.items()]


def _common_name(names: list[str]) -> str:
    """Return `model.layers.*` for a graph that serves several layers."""
    if len(names) == 1:
        return names[0]
    columns = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in columns)


def _in_one_line(reason: str) -> str:
    """Return TorchDynamo's reason for a graph break in one line, with its explanation and without its hints."""
    title, *lines = reason.strip().split("\n")
    explained = (line.partition("Explanation: ")[2].strip() for line in lines)
    return ": ".join([title, *(text for text in explained if text)])
