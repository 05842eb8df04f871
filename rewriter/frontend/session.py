"""What one compiled model is made of: options, rules, the graphs that were rewritten, and the report on them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points
from typing import Any

import torch
from torch import fx, nn

from fastlora.compat.dynamo import current_frame, graph_breaks
from fastlora.errors import FastLoRAError, StrictError
from fastlora.frontend.progress import progress
from fastlora.graph.bodies import bodies
from fastlora.graph.fake_values import meta, steady
from fastlora.kernels.core.devices import runs_kernels
from fastlora.logits.deferred_logits import Tally
from fastlora.logits.graph_pass import deferrals
from fastlora.lower.lowering import checkpoints, lower, pretend
from fastlora.lower.precompile import calls, loss_call
from fastlora.match.rule import AnyRule
from fastlora.match.rulebook import check_rules, rules_of
from fastlora.reports.from_rewrite import misses, sites
from fastlora.reports.model import Coverage, Miss, Report, Seconds, Site
from fastlora.rewrite.pipeline import PASSES, rewrite
from fastlora.rewrite.state import Rewrite
from fastlora.runtime.activation_offload import CudaLanes, Mover
from fastlora.runtime.cuda_graphs import Replays
from fastlora.runtime.graph_pool import CudaGraphs
from fastlora.runtime.memory_budget import Thrift
from fastlora.runtime.replay_choice import CudaStopwatch, Pace

_LIMIT = "TorchDynamo has made as many graphs of its code as it keeps"
LOWERINGS = ("auto", "eager", "inductor")
MODES = ("default", "reduce-overhead", "no-cudagraphs", "max-autotune")


def default_rules() -> list[AnyRule]:
    """The rules that come with fastlora, then those of installed packages.

    A package adds rules by the entry-point group `fastlora.patterns`; each entry point is a list of rules, or a module
    with such a list under the name `RULES`.
    """
    from fastlora.patterns import RULES

    found: list[AnyRule] = list(RULES)
    for entry in entry_points(group="fastlora.patterns"):
        found += rules_of(entry)
    return found


@dataclass(frozen=True)
class Options:
    """How to compile; see `fastlora.compile`."""

    lower: str = "auto"
    mode: str = "default"
    strict: bool = False
    verify: bool | str = False
    defer_logits: bool = True
    memory_budget: int | None = None
    dry: bool = False

    def __post_init__(self) -> None:
        if self.lower not in LOWERINGS:
            raise FastLoRAError(f"lower={self.lower!r} is none of {', '.join(LOWERINGS)}")
        if not isinstance(self.verify, bool) and self.verify != "first-step":
            raise FastLoRAError(f"verify={self.verify!r} must be True, False or 'first-step'")
        for name in ("strict", "defer_logits"):
            if not isinstance(value := getattr(self, name), bool):
                raise FastLoRAError(f"{name}={value!r} must be True or False")
        if self.mode not in MODES:
            raise FastLoRAError(f"mode={self.mode!r} is none of {', '.join(MODES)}")
        if self.mode == "max-autotune" and self.lower == "eager":
            raise FastLoRAError(f"mode={self.mode!r} is Inductor's: use lower='inductor', or mode='default'")

    @property
    def lowering(self) -> str:
        """`auto` runs the rewritten graph, in which fused ops carry the weight, unless the mode is Inductor's own."""
        if self.lower == "auto":
            return "inductor" if self.mode == "max-autotune" else "eager"
        return self.lower


@dataclass
class TracedGraph:
    """A graph that TorchDynamo handed over: its rewrites, the region and the code frame it is of, the class of the
    region's module, whether it does nothing but to defer a head's product, and what runs it."""

    gm: fx.GraphModule
    rewrites: list[Rewrite]
    name: str
    frame: int
    kind: type | None = None
    defers: bool = False
    replays: Replays | None = None


class Session:
    """Compiles the graphs of one model and remembers what it did."""

    def __init__(self, options: Options, rules: Sequence[AnyRule] | None = None) -> None:
        self.options = options
        self.rules = check_rules(rules) if rules is not None else default_rules()
        self.graphs: list[TracedGraph] = []
        self.tally = Tally(dry=options.dry)
        self.bypassed: Counter[str] = Counter()
        self.notes: list[str] = []
        self.seconds = Seconds()
        self.head: str | None = None
        self.head_layer: nn.Linear | None = None
        self.head_problem: str | None = None
        self.region = ""
        self.kind: type | None = None
        self.oblivious = True
        self.executions = 0
        self.on_piece: Callable[[], None] | None = None
        self.refusal: FastLoRAError | None = None
        self._recorder = CudaGraphs()
        self._pace = Pace(CudaStopwatch)
        budget = None if options.dry else options.memory_budget
        self.thrift = None if budget is None else Thrift(budget, Mover(CudaLanes(), self._note), self._note)
        self._serving: dict[tuple[str, int], TracedGraph] = {}
        self._uncompiled: dict[str, type] = {}
        self._backends: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self._breaks_before = _graph_breaks()
        self._entered = time.perf_counter()

    def enter(self, region: str, kind: type | None = None) -> None:
        """Note that a region of the model, a module of class `kind`, is about to run."""
        self.region, self.kind = region, kind
        self._entered = time.perf_counter()

    def compile_graph(self, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """A TorchDynamo backend: rewrites the graph and lowers it."""
        with progress(f"compiling {self.region or 'the model'}"):
            try:
                return self._compile_graph(gm, inputs)
            except FastLoRAError as refusal:  # which TorchDynamo may suppress, in a later piece of a region
                self.refusal = refusal
                raise

    def backend(self, state: tuple[Any, ...]) -> Callable[..., Any]:
        """Return the backend for regions in a state that TorchDynamo does not guard: it keeps the graphs of each
        backend apart."""
        if state not in self._backends:
            self._backends[state] = partial(self.compile_graph)
        return self._backends[state]

    def _compile_graph(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        self.seconds.trace += start - self._entered
        frame = current_frame()
        frame_id = len(self.graphs) if frame is None else frame
        runs_eagerly = self.options.lowering == "eager"
        defers = runs_eagerly and self.options.defer_logits
        is_head = defers and self.region == self.head
        passes = (*PASSES, *deferrals(self.tally, is_head)) if defers else PASSES
        rewrites = rewrite(gm, self.rules, self.options.verify is True, decodes=runs_eagerly, passes=passes)
        traced = TracedGraph(gm, rewrites, self.region, frame_id, self.kind, defers=rewrites[0].defers_head)
        if is_head:
            self.head_problem = None if traced.defers else str(rewrites[0].head_refusal)
        self.seconds.match += time.perf_counter() - start
        self.graphs.append(traced)
        if self.options.strict:
            self._insist(traced)
        start = time.perf_counter()
        options = self.options
        if not options.dry:
            self._compile_kernels(traced)
        thrift, stays = None if traced.defers else self._thrift_of(gm), steady(gm)
        pretends = options.dry and not traced.defers
        run = pretend(gm) if pretends else lower(gm, inputs, options.lowering, options.mode)
        traced.replays = None if traced.defers else self._replays(gm, run, stays)
        run, key = traced.replays or run, len(self.graphs)
        self._entered = time.perf_counter()
        self.seconds.lower += self._entered - start

        def served(*args: Any) -> Any:
            self._serving[self.region, frame_id] = traced
            self.executions += 1
            if self.on_piece is not None:
                self.on_piece()
            return run(*args) if thrift is None else thrift.run(key, run, args, stays)

        return served

    def _compile_kernels(self, traced: TracedGraph) -> None:
        """Compiles the kernels of a graph side by side, and with those of the first one those of the loss."""
        device = next((t.device for t in _examples(traced.gm) if t.is_cuda), None)
        if device is None or not runs_kernels(device):
            return
        from fastlora.kernels.triton.precompile import compile_kernels  # Triton is there where kernels run

        try:
            found = list(calls(traced.gm))
            if self.head_layer is not None and (loss := loss_call(traced.gm, self.head_layer)) is not None:
                self.head_layer = None
                found.append(loss)
            compile_kernels(found, device)
        except Exception as problem:  # then they are compiled one by one, where the problem shows if it is one
            self._note(f"kernels could not be compiled ahead: {type(problem).__name__}: {problem}".partition("\n")[0])

    def _replays(self, gm: fx.GraphModule, run: Callable[..., Any], stays: frozenset[int]) -> Replays | None:
        """What replays a graph on a GPU; Inductor has replays of its own."""
        options = self.options
        asked = options.mode == "reduce-overhead"
        if options.dry or options.lowering != "eager" or not (asked or options.mode == "default"):
            return None
        if _computes_on_a_cpu(gm):  # whatever that is, a recording would have it as it was once
            if asked:
                self._note("a region is not replayed as CUDA graphs: it computes on a CPU")
            return None
        return Replays(run, self._recorder, self._note, None if asked else self._pace, stays)

    def _thrift_of(self, gm: fx.GraphModule) -> Thrift | None:
        if self.thrift is not None and checkpoints(gm):
            self._note(
                "memory_budget has no effect on a region with gradient checkpointing, which keeps next to nothing"
            )
            return None
        return self.thrift

    def ran(self, region: str, kind: type, graphs: int) -> None:
        """Note how many graphs a region, a module of class `kind`, has run. Once TorchDynamo has made as many graphs
        of some code as it may, it runs that code as it is, and says nothing.

        Raises:
            StrictError: if that has happened, and the session is strict.
        """
        if graphs:
            self._uncompiled.pop(region, None)
        elif any(traced.kind is kind for traced in self.graphs):
            self._uncompiled[region] = kind
            if self.options.strict:
                raise StrictError(f"strict=True, and {region or 'the model'} runs uncompiled: {_LIMIT}")

    def forget(self) -> None:
        """Drops the recordings of all graphs."""
        for traced in self.graphs:
            if traced.replays is not None:
                traced.replays.forget()
        self._recorder.forget()
        self._pace.forget()

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _insist(self, traced: TracedGraph) -> None:
        left = [miss for r in traced.rewrites for miss in misses(r, traced.name, 1)]
        if self.region == self.head and self.head_problem is not None:
            left.append(self._missed_loss(self.head_problem))
        if left:
            listed = "\n".join(f"  {miss.op} {miss.where}: {miss.reason}" for miss in left)
            raise StrictError(f"strict=True, and these candidates stay as they are:\n{listed}")

    def report(self) -> Report:
        """Everything known so far."""
        report = Report(graphs=len(self.graphs), seconds=self.seconds, notes=list(self.notes))
        regions: dict[int, list[str]] = {}
        for (region, _), traced in self._serving.items():  # a region that was traced again counts by its last graph
            regions.setdefault(id(traced), []).append(region)
        for traced in self.graphs:
            if id(traced) not in regions:
                continue
            count, name = len(regions[id(traced)]), _common_name(regions[id(traced)])
            for made in traced.rewrites:
                claimed = made.claimed()
                for family, anchors in made.anchors.items():
                    coverage = report.coverage.setdefault(family, Coverage())
                    coverage.seen += count * len(anchors)
                    coverage.fused += count * sum(anchor in claimed for anchor in anchors)
                report.fused += sites(made, name, count)
                report.missed += misses(made, name, count)
            key = name if name not in report.code else f"{name} ({len(report.code)})"
            report.code[key] = traced.gm.print_readable(print_output=False)
        self._report_uncompiled(report)
        self._report_loss(report)
        recorded = sum(traced.replays.recorded for traced in self.graphs if traced.replays is not None)
        thrifty = self.thrift.summary() if self.thrift is not None else None
        if thrifty is not None:
            report.notes.append(thrifty)
        if recorded:
            report.notes.append(f"{recorded} recordings of regions are replayed as CUDA graphs")
        report.breaks = [reason for reason, n in (_graph_breaks() - self._breaks_before).items() if n > 0]
        report.notes += [f"{count} calls ran uncompiled: {reason}" for reason, count in self.bypassed.items()]
        return report

    def _report_uncompiled(self, report: Report) -> None:
        """Count what the regions that ran as they were would have had, by the graphs of others of their class."""
        for region, kind in self._uncompiled.items():
            like = next(traced for traced in reversed(self.graphs) if traced.kind is kind)
            for family, anchors in ((f, a) for made in like.rewrites for f, a in made.anchors.items() if a):
                report.coverage.setdefault(family, Coverage()).seen += len(anchors)
                report.missed.append(Miss(family, "", region, f"the module ran uncompiled: {_LIMIT}", len(anchors)))

    def miss_loss(self, reason: str) -> None:
        """Note that the head has computed its logits, and why.

        Raises:
            StrictError: if the session is strict.
        """
        self.head_problem = reason
        self.bypassed[f"the head's loss is not fused, as {reason}"] += 1
        if self.options.strict:
            raise StrictError(f"strict=True, and the loss of {self.head or 'the head'} stays as it is: {reason}")

    def _missed_loss(self, reason: str) -> Miss:
        return Miss("loss", "deferred logits", self.head or "", reason)

    def _report_loss(self, report: Report) -> None:
        if self.head is None:
            return
        coverage = report.coverage.setdefault("loss", Coverage())
        if not self.tally.deferred:
            if self.head_problem is not None and not coverage.seen and self.executions:
                coverage.seen += 1
                report.missed.append(self._missed_loss(self.head_problem))
            return
        coverage.seen += 1
        if self.tally.fused:
            coverage.fused += 1
            report.fused.append(Site("linear_cross_entropy", "deferred logits", self.head, 2, 0))
        elif self.tally.materialized:
            lines = ", ".join(self.tally.materialized)
            report.missed.append(self._missed_loss(f"the logits themselves were used by {lines}"))
        else:
            report.missed.append(self._missed_loss("no cross-entropy was taken of the logits"))
        for line, count in self.tally.materialized.items():
            report.notes.append(f"logits were materialized {count} times, by {line}")


def _computes_on_a_cpu(gm: fx.GraphModule) -> bool:
    return any(example.device.type == "cpu" for example in _examples(gm))


def _examples(gm: fx.GraphModule) -> Iterator[torch.Tensor]:
    """The values that tracing saw."""
    for body in bodies(gm):
        yield from (example for node in body.graph.nodes if (example := meta(node)) is not None)


def _common_name(names: list[str]) -> str:
    """`model.layers.*` for a graph that serves several layers."""
    if len(names) == 1:
        return names[0]
    columns = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in columns)


def _graph_breaks() -> Counter[str]:
    counted: Counter[str] = Counter()
    for reason, count in graph_breaks().items():
        counted[_in_one_line(reason)] += count
    return counted


def _in_one_line(reason: str) -> str:
    """What TorchDynamo could not trace, and how it explains that, without its hints."""
    title, *lines = reason.strip().split("\n")
    explained = (line.partition("Explanation: ")[2].strip() for line in lines)
    return ": ".join([title, *(text for text in explained if text)])
