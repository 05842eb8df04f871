"""Probes of `fastlora.compat.tracing`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from fastlora.compat import tracing
from fastlora.compat.probes.probe import collector, expect

PROBES, probe = collector()


def _traced(function: Callable[..., Any], *args: Any) -> list[fx.Node]:
    """Return the nodes that TorchDynamo traces for a function."""
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    torch.compile(function, backend=backend, fullgraph=True)(*args)
    expect(len(graphs) == 1, "the function is traced as one graph")
    return list(graphs[0].graph.nodes)


@probe("set_grad_enabled")
def _gradient_modes_are_calls_in_a_graph() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            y = x * 2
        return x + y

    calls = [node.args for node in _traced(function, torch.ones(2)) if node.target is tracing.set_grad_enabled]
    expect(calls == [(False,), (True,)], "a no_grad region is a pair of calls")


@probe("enter_autocast", "exit_autocast")
def _autocast_regions_are_calls_in_a_graph() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x

    nodes = _traced(function, torch.ones(2, 2))
    enters = [node for node in nodes if node.target is tracing.enter_autocast]
    exits = [node for node in nodes if node.target is tracing.exit_autocast]
    expect(len(enters) == 1 and [node.args[0] for node in exits] == enters, "a region is a pair of calls")


@probe("enter_inference_mode", "exit_inference_mode")
def _inference_regions_are_calls_in_a_graph() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            y = x * 2
        return y + 1

    nodes = _traced(function, torch.ones(2))
    enters = [node for node in nodes if node.target is tracing.enter_inference_mode]
    exits = [node for node in nodes if node.target is tracing.exit_inference_mode]
    expect(len(enters) == 1 and [node.args[0] for node in exits] == enters, "a region is a pair of calls")


@probe("is_of_functorch", "disable_saved_tensors_hooks", "enable_saved_tensors_hooks")
def _transforms_are_calls_in_a_graph() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return (x * x).sum()

    nodes = _traced(torch.func.grad(function), torch.ones(2))
    names = [str(getattr(node.target, "__name__", "")) for node in nodes if tracing.is_of_functorch(node)]
    expect(any(name.endswith("_increment_nesting") for name in names), "a transform starts with a call")
    expect(any(name.endswith("_decrement_nesting") for name in names), "a transform ends with a call")
    targets = [node.target for node in nodes]
    expect(tracing.disable_saved_tensors_hooks in targets, "hooks on saved tensors are disabled inside a transform")
    expect(tracing.enable_saved_tensors_hooks in targets, "they are enabled again after a transform")


@probe("FakeTensor", "FakeTensorMode", "ShapeEnv")
def _operations_run_on_fake_tensors() -> None:
    shapes = tracing.ShapeEnv()
    with tracing.FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True) as mode:
        made = torch.empty(2, 3)
        made.add_(1)
    expect(isinstance(made, tracing.FakeTensor) and made.fake_mode is mode, "tensors made under the mode are fake")
    expect(mode.shape_env is shapes and len(shapes.guards) == 0, "guards on sizes can be counted")
    expect(made._version == 1, "an in-place write is counted")


@probe("statically_known_true")
def _comparisons_of_sizes_add_no_guard() -> None:
    found: list[bool] = []

    def backend(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        for node in gm.graph.nodes:
            example = node.meta.get("example_value")
            if node.op == "placeholder" and isinstance(example, torch.Tensor):
                size: Any = example.shape[0]
                found.extend(tracing.statically_known_true(each) for each in (size == size, size == 7))
        return gm.forward

    torch.compile(lambda x: x * 2, backend=backend, dynamic=True)(torch.ones(5, 2))
    expect(found == [True, False], "a size is known to be itself, and not known to be a number")
