"""TorchDynamo and Inductor: their settings, errors and counters, and the marks that they put on what is traced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx.experimental._config
from torch import fx
from torch._dynamo import OptimizedModule
from torch._dynamo.exc import BackendCompilerFailed, TorchRuntimeError
from torch._dynamo.utils import calculate_time_spent, counters
from torch._guards import CompileContext

__all__ = [
    "INLINE_ATTRIBUTE",
    "BackendCompilerFailed",
    "OptimizedModule",
    "TorchRuntimeError",
    "checkpoint_context",
    "compile_with_inductor",
    "config",
    "current_frame",
    "graph_breaks",
    "is_held_by_a_module",
    "shape_config",
    "traced_seconds",
]

config = torch._dynamo.config
"""TorchDynamo's settings, of which these are set while a region runs: `recompile_limit`, `suppress_errors` (run code
that cannot be traced as it is) and `skip_nnmodule_hook_guards` (hooks registered later are ignored). In torch 2.11
`torch.compile` has no argument for the first."""

shape_config = torch.fx.experimental._config
"""The settings of symbolic shapes, of which `backed_size_oblivious` is set while a region runs: sizes of one then share
the graph of others."""

INLINE_ATTRIBUTE = "_torchdynamo_inline"
"""The attribute of a function that has TorchDynamo trace another function in its place. `torch.compile` sets it on what
it returns."""


def current_frame() -> int | None:
    """Return the number of the code that TorchDynamo is compiling: graphs of the same code have the same one."""
    compiling = CompileContext.current_compile_id()
    return None if compiling is None else compiling.frame_id


def graph_breaks() -> Counter[str]:
    """Return how often TorchDynamo has broken a graph in this process, by its reasons."""
    return Counter(counters["graph_break"])


def traced_seconds() -> float:
    """Return the seconds that TorchDynamo has spent in this process, without those in backends."""
    spent = calculate_time_spent()
    return max(0.0, spent.get("entire_frame_compile", 0.0) - spent.get("backend_compile", 0.0))


def is_held_by_a_module(node: fx.Node) -> bool:
    """Whether TorchDynamo found a graph's input in a module, and not among the arguments of the call."""
    return node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None


def checkpoint_context(body: fx.GraphModule) -> Callable[[], Any] | None:
    """Return the `context_fn` of the checkpoint that a body of a graph was traced for, if there is one."""
    return body.meta.get("_checkpoint_context_fn")


def compile_with_inductor(gm: fx.GraphModule, inputs: Sequence[Any], mode: str | None) -> Callable[..., Any]:
    """Compile a graph as `torch.compile(backend="inductor", mode=mode)` does; None for Inductor's default."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, list(inputs), config_patches=None if mode is None else list_mode_options(mode))
    return compiled
