"""Probes of `fastlora.compat.dynamo`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from fastlora.compat import dynamo
from fastlora.compat.probes.probe import collector, expect

PROBES, probe = collector()


class _GraphCollector:
    """A backend that keeps the graphs it compiles."""

    def __init__(self) -> None:
        self.graphs: list[fx.GraphModule] = []
        self.frames: list[int | None] = []

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.graphs.append(gm)
        self.frames.append(dynamo.current_frame())
        return gm.forward


@probe("config", "shape_config")
def _settings_have_their_names() -> None:
    expect(isinstance(dynamo.config.recompile_limit, int), "recompile_limit is a number")
    for name in ("suppress_errors", "skip_nnmodule_hook_guards"):
        expect(isinstance(getattr(dynamo.config, name), bool), f"{name} is a bool")
    expect(isinstance(dynamo.shape_config.backed_size_oblivious, bool), "backed_size_oblivious is a bool")


@probe("OptimizedModule")
def _compiled_modules_are_recognized() -> None:
    module = nn.ReLU()
    made: Any = torch.compile(module, backend="eager")
    expect(isinstance(made, dynamo.OptimizedModule), "torch.compile returns an OptimizedModule")
    expect(made._orig_mod is module, "_orig_mod is the module")


@probe("BackendCompilerFailed")
def _errors_of_backends_are_wrapped() -> None:
    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        raise ValueError("refused")

    try:
        torch.compile(lambda x: x * 2, backend=backend)(torch.ones(2))
    except dynamo.BackendCompilerFailed as failure:
        expect(isinstance(failure.inner_exception, ValueError), "inner_exception is the error of the backend")
    else:
        expect(False, "an error in a backend is raised")


@probe("TorchRuntimeError")
def _errors_of_operations_are_wrapped() -> None:
    try:
        torch.compile(lambda x: x.view(7), backend="eager", fullgraph=True)(torch.ones(2, 3))
    except dynamo.TorchRuntimeError:
        return
    expect(False, "an operation that cannot run raises TorchRuntimeError while it is traced")


@probe("INLINE_ATTRIBUTE")
def _inline_attribute_is_traced() -> None:
    def called(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    setattr(called, dynamo.INLINE_ATTRIBUTE, lambda x: x * 3)
    made = torch.compile(lambda x: called(x), backend="eager", fullgraph=True)(torch.ones(1))
    expect(made.item() == 3.0, "the function in the attribute is traced")
    expect(called(torch.ones(1)).item() == 2.0, "a call that is not traced runs the function itself")


@probe("current_frame", "is_static_input")
def _frames_and_static_inputs_are_recorded() -> None:
    backend, layer = _GraphCollector(), nn.Linear(2, 2)
    expect(dynamo.current_frame() is None, "no frame is compiled outside of a backend")
    torch.compile(lambda x: layer(x), backend=backend)(torch.ones(1, 2))
    expect(isinstance(backend.frames[0], int), "the compiled frame has an id")
    inputs = [node for node in backend.graphs[0].graph.nodes if node.op == "placeholder"]
    static = [dynamo.is_static_input(node) for node in inputs]
    expect(sum(static) == 2 and len(static) == 3, "weight and bias are static inputs, the argument is not")


@probe("checkpoint_context")
def _context_fn_of_a_checkpoint_is_kept() -> None:
    from torch.utils.checkpoint import noop_context_fn

    backend = _GraphCollector()

    def context() -> Any:
        return noop_context_fn()

    def function(x: torch.Tensor) -> Any:
        return checkpoint(torch.sin, x, use_reentrant=False, context_fn=context)

    torch.compile(function, backend=backend, fullgraph=True)(torch.ones(2, requires_grad=True))
    target = torch.ops.higher_order.tag_activation_checkpoint
    (node,) = [node for node in backend.graphs[0].graph.nodes if node.target is target]
    body = getattr(backend.graphs[0], node.args[0].target)
    expect(dynamo.checkpoint_context(body) is not None, "the body has the context_fn of the checkpoint")


@probe("graph_breaks")
def _graph_breaks_are_counted() -> None:
    before = sum(dynamo.graph_breaks().values())

    def function(x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return x + 1

    torch.compile(function, backend="eager")(torch.ones(2))
    expect(sum(dynamo.graph_breaks().values()) == before + 1, "a graph break is counted by its reason")


@probe("traced_seconds")
def _tracing_is_timed() -> None:
    before = dynamo.traced_seconds()
    torch.compile(lambda x: x * 2, backend="eager")(torch.ones(2))
    expect(dynamo.traced_seconds() > before, "tracing takes time")


@probe("compile_with_inductor")
def _inductor_has_its_modes() -> None:
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    expect(callable(compile_fx), "compile_fx is a function")
    expect(isinstance(list_mode_options("max-autotune"), dict), "a mode is a dictionary of settings")
