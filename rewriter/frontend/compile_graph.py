"""Compiling a graph that TorchDynamo traced: rewrite and lower it, precompile its kernels, replay it as CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from fastlora.compat.dynamo import current_frame
from fastlora.errors import FastLoRAError, StrictError
from fastlora.frontend.collect import unfused_loss_miss
from fastlora.frontend.dump import GraphDump
from fastlora.frontend.logs import log_graph
from fastlora.frontend.progress import progress
from fastlora.frontend.session import CompiledGraph, Session
from fastlora.graph.bodies import bodies
from fastlora.graph.fake_values import meta, static_input_indices
from fastlora.kernels.core import shortcuts
from fastlora.kernels.core.devices import runs_kernels
from fastlora.logits.graph_pass import deferral_passes
from fastlora.lower.lowering import has_checkpoints, lower, make_dry_run
from fastlora.lower.precompile import loss_call, op_calls
from fastlora.reports.from_rewrite import misses
from fastlora.reports.program import program_of
from fastlora.rewrite.pipeline import PASSES, rewrite
from fastlora.runtime.cuda_graphs import GraphReplayer
from fastlora.runtime.memory_budget import ActivationBudget


def backend_for(session: Session, state: tuple[Any, ...] = ()) -> Callable[..., Any]:
    """Return the TorchDynamo backend of a session.

    Args:
        session: the session of the compiled model.
        state: what the graphs depend on but TorchDynamo does not guard. There is a backend for each state, since
            TorchDynamo does not share graphs between backends.
    """
    if state not in session.backends:
        session.backends[state] = partial(compile_graph, session)
    return session.backends[state]


def compile_graph(session: Session, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    """Compile a graph, as a TorchDynamo backend does, and return the function to call in its place."""
    with progress(f"compiling {session.region or 'the model'}"):
        try:
            graph = _rewrite(session, gm)
            return _lower(session, graph, inputs)
        except FastLoRAError as error:
            session.error = error
            raise


def _rewrite(session: Session, gm: fx.GraphModule) -> CompiledGraph:
    """Rewrite a graph and add it to the session."""
    start = time.perf_counter()
    session.seconds.trace += start - session.entered
    dump = GraphDump.from_environment(session.region, gm)
    frame, options = current_frame(), session.options
    runs_eagerly = options.lowering == "eager"
    defers = runs_eagerly and options.defer_logits
    is_head = defers and session.region == session.head
    passes = (*PASSES, *deferral_passes(session.deferral_stats, is_head)) if defers else PASSES
    rewrites = rewrite(gm, session.rules, options.verify is True, reads_quantized=runs_eagerly, passes=passes)
    graph = CompiledGraph(
        gm,
        rewrites,
        session.region,
        len(session.graphs) if frame is None else frame,
        session.module_class,
        program_of(gm),
        defers=rewrites[0].defers_head,
    )
    if is_head:
        session.head_problem = None if graph.defers else str(rewrites[0].head_refusal)
    seconds = time.perf_counter() - start
    session.seconds.match += seconds
    log_graph(rewrites, session.region, recompiled=any(g.name == graph.name for g in session.graphs), seconds=seconds)
    session.graphs.append(graph)
    if dump is not None:
        dump.write(graph.program, rewrites)
    if options.strict:
        _refuse_misses(session, graph)
    return graph


def _refuse_misses(session: Session, graph: CompiledGraph) -> None:
    missed = [miss for rewritten in graph.rewrites for miss in misses(rewritten, graph.name, 1)]
    if session.region == session.head and session.head_problem is not None:
        missed.append(unfused_loss_miss(session, session.head_problem))
    if missed:
        listed = "\n".join(f"  {miss.op} {miss.where}: {miss.reason}" for miss in missed)
        raise StrictError(f"strict=True, and these candidates are not fused:\n{listed}")


def _lower(session: Session, graph: CompiledGraph, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Return the function that runs a rewritten graph."""
    start, options, gm = time.perf_counter(), session.options, graph.gm
    if not options.dry:
        _compile_kernels(session, gm)
    budget, static_inputs = None if graph.defers else _budget_for(session, gm), static_input_indices(gm)
    is_dry = options.dry and not graph.defers
    run = make_dry_run(gm) if is_dry else lower(gm, inputs, options.lowering, options.mode)
    if not graph.defers:
        graph.replayer = _replayer(session, gm, run, static_inputs)
    run, key = graph.replayer or run, len(session.graphs)
    session.entered = time.perf_counter()
    session.seconds.lower += session.entered - start

    def serve(*args: Any) -> Any:
        session.serving[session.region, graph.frame] = graph
        session.executions += 1
        if session.before_graph is not None:
            session.before_graph()
        return run(*args) if budget is None else budget.run(key, run, args, static_inputs)

    return serve


def _compile_kernels(session: Session, gm: fx.GraphModule) -> None:
    """Compile the kernels of a graph in parallel, and those of the loss with the first graph that returns hidden
    states."""
    device = next((t.device for t in _examples(gm) if t.is_cuda), None)
    if device is None or not runs_kernels(device) or not shortcuts.use.precompilation:
        return
    from fastlora.kernels.triton.precompile import compile_kernels  # Triton is installed where kernels run

    try:
        calls = list(op_calls(gm))
        head = None if session.head_layer is None else session.head_layer()
        if head is not None and (loss := loss_call(gm, head)) is not None:
            session.head_layer = None
            calls.append(loss)
        compile_kernels(calls, device)
    except Exception as problem:  # kernels are then compiled at their first launch, which raises the actual error
        reason = f"{type(problem).__name__}: {problem}".partition("\n")[0]
        session.note(f"kernels could not be compiled in advance: {reason}")


def _replayer(
    session: Session, gm: fx.GraphModule, run: Callable[..., Any], static_inputs: frozenset[int]
) -> GraphReplayer | None:
    """Return what replays a graph on a GPU, or None if it must not be replayed. Inductor has its own CUDA graphs."""
    options = session.options
    always = options.mode == "reduce-overhead"
    if options.dry or options.lowering != "eager" or not (always or options.mode == "default"):
        return None
    if any(example.device.type == "cpu" for example in _examples(gm)):  # a replay would not recompute it
        if always:
            session.note("a region is not captured as CUDA graphs: it computes on a CPU")
        return None
    timer = None if always else session.replay_timer
    return GraphReplayer(run, session.recorder, session.note, timer, static_inputs, session.region or "the model")


def _budget_for(session: Session, gm: fx.GraphModule) -> ActivationBudget | None:
    if session.budget is not None and has_checkpoints(gm):
        session.note("memory_budget has no effect on a region with gradient checkpointing, which keeps next to nothing")
        return None
    return session.budget


def _examples(gm: fx.GraphModule) -> Iterator[torch.Tensor]:
    """Yield the fake tensors that tracing recorded."""
    for body in bodies(gm):
        yield from (example for node in body.graph.nodes if (example := meta(node)) is not None)
