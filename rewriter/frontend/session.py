"""The state of one compiled model: its options and rules, the compiled graphs, and counts for the report.

A session only holds state: `compile_graph` compiles, and `collect` makes the report.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from fastlora.compat.dynamo import graph_breaks
from fastlora.errors import FastLoRAError, StrictError
from fastlora.frontend.options import Options, default_rules
from fastlora.logits.deferred_logits import DeferralStats
from fastlora.match.rule import AnyRule
from fastlora.match.rulebook import check_rules
from fastlora.reports.model import Seconds
from fastlora.rewrite.state import Rewrite
from fastlora.runtime.activation_offload import ActivationOffloader
from fastlora.runtime.copy_streams import CudaCopyStreams
from fastlora.runtime.cuda_graphs import GraphReplayer
from fastlora.runtime.graph_pool import CudaGraphRecorder
from fastlora.runtime.memory_budget import ActivationBudget
from fastlora.runtime.replay_choice import CudaStopwatch, ReplayTimer

RECOMPILE_LIMIT = "TorchDynamo has reached the recompile limit of its code"


@dataclass
class CompiledGraph:
    """A graph that TorchDynamo traced and fastlora compiled.

    Attributes:
        gm: the graph, rewritten and lowered.
        rewrites: the results of rewriting the graph and the bodies of its checkpointed regions.
        name: the region of the model that it was traced for.
        frame: the number of the frame that it was traced from.
        module_class: the class of the region's module.
        program: the rewritten graph as a Python file that runs it.
        defers: whether it only defers the logits of an output head.
        replayer: replays it as CUDA graphs; None if it always runs without.
    """

    gm: fx.GraphModule
    rewrites: list[Rewrite]
    name: str
    frame: int
    module_class: type | None = None
    program: str = ""
    defers: bool = False
    replayer: GraphReplayer | None = None


class Session:
    """The options, graphs and history of one compiled model.

    Attributes:
        options, rules: what to compile with.
        graphs: the compiled graphs, in order.
        serving: the graph that ran last, by region and frame number.
        uncompiled: the class of each region that runs uncompiled although others of its class were compiled.
        deferral_stats: counts what happened to deferred logits.
        bypassed: how many calls ran uncompiled, by reason.
        notes: further sentences for the report.
        head: the path of the output head.
        head_layer: the output head, until its loss is precompiled.
        head_problem: why the loss of the output head is not fused.
        region, module_class: the region that runs, and the class of its module.
        executions: how often a compiled graph has run.
        size_oblivious: whether sizes of one may share a graph with other sizes.
        before_graph: called before each graph runs, if set.
        error: the error that fastlora has raised in its backend, which TorchDynamo may suppress.
        budget: keeps the activations of a forward within `memory_budget`, if there is one.
    """

    def __init__(self, options: Options, rules: Sequence[AnyRule] | None = None) -> None:
        self.options = options
        self.rules = check_rules(rules) if rules is not None else default_rules()
        self.graphs: list[CompiledGraph] = []
        self.serving: dict[tuple[str, int], CompiledGraph] = {}
        self.uncompiled: dict[str, type] = {}
        self.backends: dict[tuple[Any, ...], Callable[..., Any]] = {}
        self.deferral_stats = DeferralStats(dry=options.dry)
        self.bypassed: Counter[str] = Counter()
        self.notes: list[str] = []
        self.seconds = Seconds()
        self.head: str | None = None
        self.head_layer: weakref.ref[nn.Linear] | None = None
        self.head_problem: str | None = None
        self.region = ""
        self.module_class: type | None = None
        self.executions = 0
        self.size_oblivious = True
        self.before_graph: Callable[[], None] | None = None
        self.error: FastLoRAError | None = None
        self.recorder = CudaGraphRecorder()
        self.replay_timer = ReplayTimer(CudaStopwatch)
        self.budget = None if options.dry else self._activation_budget(options.memory_budget)
        self.breaks_before = graph_breaks()
        self.entered = time.perf_counter()

    def _activation_budget(self, budget: int | None) -> ActivationBudget | None:
        if budget is None:
            return None
        return ActivationBudget(budget, ActivationOffloader(CudaCopyStreams(), self.note), self.note)

    def begin_region(self, region: str, module_class: type | None = None) -> None:
        """Record that a region of the model is about to run."""
        self.region, self.module_class = region, module_class
        self.entered = time.perf_counter()

    def end_region(self, region: str, module_class: type, graphs: int) -> None:
        """Record how many graphs a region has run. Zero means that TorchDynamo has silently run it uncompiled, as it
        does once its code was compiled as often as the recompile limit allows.

        Raises:
            StrictError: if that has happened, and the session is strict.
        """
        if graphs:
            self.uncompiled.pop(region, None)
        elif any(graph.module_class is module_class for graph in self.graphs):
            self.uncompiled[region] = module_class
            if self.options.strict:
                raise StrictError(f"strict=True, and {region or 'the model'} runs uncompiled: {RECOMPILE_LIMIT}")

    def record_unfused_loss(self, reason: str) -> None:
        """Record why the output head has computed its logits.

        Raises:
            StrictError: if the session is strict.
        """
        self.head_problem = reason
        self.bypassed[f"the head's loss is not fused, as {reason}"] += 1
        if self.options.strict:
            raise StrictError(f"strict=True, and the loss of {self.head or 'the head'} is not fused: {reason}")

    def note(self, text: str) -> None:
        """Add a sentence to the notes of the report, unless it is there already."""
        if text not in self.notes:
            self.notes.append(text)

    def drop_cuda_graphs(self) -> None:
        """Free all CUDA graphs, except those whose backward may still run."""
        for graph in self.graphs:
            if graph.replayer is not None:
                graph.replayer.clear()
        self.recorder.clear()
        self.replay_timer.clear()
