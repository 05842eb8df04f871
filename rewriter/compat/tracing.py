"""Fake tensors and symbolic shapes, and the calls by which a traced graph enters and exits modes."""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, statically_known_true

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "ShapeEnv",
    "disable_saved_tensors_hooks",
    "enable_saved_tensors_hooks",
    "enter_autocast",
    "enter_inference_mode",
    "exit_autocast",
    "exit_inference_mode",
    "is_of_functorch",
    "set_grad_enabled",
    "statically_known_true",
]

set_grad_enabled = torch._C._set_grad_enabled
"""In a graph: `torch.no_grad` and similar; the argument is whether gradients are enabled from there on."""

enter_autocast = torch.amp.autocast_mode._enter_autocast
exit_autocast = torch.amp.autocast_mode._exit_autocast
"""In a graph: the start and end of a `torch.autocast` region; the end takes the node of the start."""

enter_inference_mode = torch.autograd.grad_mode._enter_inference_mode
exit_inference_mode = torch.autograd.grad_mode._exit_inference_mode
"""In a graph: the start and end of a `torch.inference_mode` region; the end takes the node of the start."""

disable_saved_tensors_hooks = torch._C._autograd._saved_tensors_hooks_disable
enable_saved_tensors_hooks = torch._C._autograd._saved_tensors_hooks_enable
"""In a graph: the start and end of a `torch.autograd.graph.disable_saved_tensors_hooks` region, as in transforms of
torch.func."""


def is_of_functorch(node: fx.Node) -> bool:
    """Return whether a node calls a function of `torch._functorch` or `torch._C._functorch`, which start and end
    transforms of torch.func, and wrap and unwrap tensors."""
    return node.op == "call_function" and "_functorch" in str(getattr(node.target, "__module__", ""))
