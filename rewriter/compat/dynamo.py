"""TorchDynamo and Inductor: their settings, errors and counters, and the metadata of traced graphs."""

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
    "is_static_input",
    "shape_config",
    "traced_seconds",
]

config = torch._dynamo.config
"""TorchDynamo's settings. While a region runs, these are set: `recompile_limit`, for which `torch.compile` has no
argument in torch 2.11, `suppress_errors` (run code uncompiled if it cannot be traced), and
`skip_nnmodule_hook_guards` (do not guard on hooks)."""

shape_config = torch.fx.experimental._config
"""The settings of symbolic shapes. While a region runs, `backed_size_oblivious` is set: sizes of one then share a graph
with other sizes."""

INLINE_ATTRIBUTE = "_torchdynamo_inline"
"""The attribute of a function that TorchDynamo traces instead of the function. `torch.compile` sets it on the functions
that it returns."""


def current_frame() -> int | None:
    """Return the id of the frame that TorchDynamo is compiling, which graphs of the same code share."""
    compiling = CompileContext.current_compile_id()
    return None if compiling is None else compiling.frame_id


def graph_breaks() -> Counter[str]:
    """Return the counts of TorchDynamo's graph breaks in this process, by reason."""
    return Counter(counters["graph_break"])


def traced_seconds() -> float:
    """Return the seconds that TorchDynamo has spent in this process, excluding backends."""
    spent = calculate_time_spent()
    return max(0.0, spent.get("entire_frame_compile", 0.0) - spent.get("backend_compile", 0.0))


def is_static_input(node: fx.Node) -> bool:
    """Return whether an input of a graph is an attribute of a module instead of an argument of the call."""
    return node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None


def checkpoint_context(body: fx.GraphModule) -> Callable[[], Any] | None:
    """Return the `context_fn` of the checkpoint for which a body of a graph was traced, if there is one."""
    return body.meta.get("_checkpoint_context_fn")


def compile_with_inductor(gm: fx.GraphModule, inputs: Sequence[Any], mode: str | None) -> Callable[..., Any]:
    """Compile a graph as `torch.compile(backend="inductor", mode=mode)` does; None for Inductor's default."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, list(inputs), config_patches=None if mode is None else list_mode_options(mode))
    return compiled
