"""The state of one compiled model: its options and rules, the graphs that were compiled, and what happened so far.

A session compiles nothing itself (`compile_graph` does) and knows nothing of how a report is made (`collect` does).
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
from fastlora.runtime.graph_pool import CudaGraphs
from fastlora.runtime.memory_budget import ActivationBudget
from fastlora.runtime.replay_choice import CudaStopwatch, ReplayTimer

RECOMPILE_LIMIT = "TorchDynamo has reached the recompile limit of its code"


@dataclass
class CompiledGraph:
    """A graph that TorchDynamo traced and fastlora compiled.

    Attributes:
        gm: the graph, rewritten and lowered.
        rewrites: how it was rewritten, and the bodies of its checkpointed regions.
        name: the region of the model that it was traced for.
        frame: the number of the code that it was traced from.
        module_class: the class of the region's module.
        program: the rewritten graph as a Python file that runs it.
        defers: whether it does nothing but defer the product of an output head.
        replays: what replays it as CUDA graphs, if anything does.
    """

    gm: fx.GraphModule
    rewrites: list[Rewrite]
    name: str
    frame: int
    module_class: type | None = None
    program: str = ""
    defers: bool = False
    replays: GraphReplayer | None = None


class Session:
    """The options, the graphs and the history of one compiled model.

    Attributes:
        options, rules: what to compile with.
        graphs: the graphs that were compiled, in order.
        serving: the graph that ran last, by region and by the number of its code.
        uncompiled: the class of each region that runs uncompiled although others of its class were compiled.
        deferral_stats: counts what happened to deferred logits.
        bypassed: how many calls ran uncompiled, by reason.
        notes: further sentences for the report.
        head, head_layer, head_problem: the path of the output head, the head until its loss was precompiled, and why
            its loss is not fused.
        region, module_class: the region that runs, and the class of its module.
        executions: how often a compiled graph has run.
        oblivious: whether a size of one may share the graph of other sizes.
        before_graph: called before a graph runs, if set.
        error: what fastlora raised in its backend, which TorchDynamo may suppress.
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
        self.oblivious = True
        self.before_graph: Callable[[], None] | None = None
        self.error: FastLoRAError | None = None
        self.recorder = CudaGraphs()
        self.replay_timer = ReplayTimer(CudaStopwatch)
        self.budget = None if options.dry else self._activation_budget(options.memory_budget)
        self.breaks_before = graph_breaks()
        self.entered = time.perf_counter()

    def _activation_budget(self, budget: int | None) -> ActivationBudget | None:
        if budget is None:
            return None
        return ActivationBudget(budget, ActivationOffloader(CudaCopyStreams(), self.note), self.note)

    def enter(self, region: str, module_class: type | None = None) -> None:
        """Note that a region of the model is about to run."""
        self.region, self.module_class = region, module_class
        self.entered = time.perf_counter()

    def leave(self, region: str, module_class: type, graphs: int) -> None:
        """Note how many graphs a region has run. Once TorchDynamo has compiled some code as often as the recompile
        limit allows, it runs that code uncompiled and says nothing.

        Raises:
            StrictError: if that has happened, and the session is strict.
        """
        if graphs:
            self.uncompiled.pop(region, None)
        elif any(graph.module_class is module_class for graph in self.graphs):
            self.uncompiled[region] = module_class
            if self.options.strict:
                raise StrictError(f"strict=True, and {region or 'the model'} runs uncompiled: {RECOMPILE_LIMIT}")

    def miss_loss(self, reason: str) -> None:
        """Note that the head has computed its logits, and why.

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

    def forget(self) -> None:
        """Drop the CUDA graphs of all graphs."""
        for graph in self.graphs:
            if graph.replays is not None:
                graph.replays.forget()
        self.recorder.forget()
        self.replay_timer.forget()
