"""Printing a traced graph as a Python file that runs it on random inputs of the traced shapes, forward and backward.

The files before and after rewriting draw the same inputs, so their results can be compared, except if the graph itself
draws random numbers, such as for dropout: rewriting changes those.
"""

from __future__ import annotations

import operator
from types import ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from fastlora.graph.fake_values import hint, meta
from fastlora.logits.graph_pass import DeferredHead, DeferredLoRAHead

_HEADER = '''"""A graph of a model, on random inputs: `python FILE` prints the norms of its outputs and gradients."""

import operator

import torch
import torch.utils.checkpoint
from torch import device, inf, nan

import fastlora.kernels.ops  # registers the ops
{imports}

def tensor(shape, stride, dtype, device, requires_grad):
    size = 1 + sum((n - 1) * step for n, step in zip(shape, stride)) if all(shape) else 0
    values = torch.randn(size) / 8 if dtype.is_floating_point else torch.randint(0, 2, (size,))
    return values.to(device, dtype).as_strided(shape, stride).requires_grad_(requires_grad)
'''

_FOOTER = '''
def run():
    """Return the outputs of the graph, and the gradients of its inputs for fixed gradients of the outputs."""
    inputs = make_inputs()
    outputs = [t for t in Graph()(*inputs) if isinstance(t, torch.Tensor)]
    leaves = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    roots = [t for t in outputs if t.requires_grad]
    grad_outputs = [torch.linspace(-1, 1, t.numel()).reshape(t.shape).to(t.device, t.dtype) for t in roots]
    grads = torch.autograd.grad(roots, leaves, grad_outputs, allow_unused=True) if roots and leaves else []
    return [t.detach() for t in outputs], list(grads)


if __name__ == "__main__":
    for kind, tensors in zip(("output", "gradient"), run()):
        for t in tensors:
            print(kind, "None" if t is None else f"{tuple(t.shape)} {t.dtype} norm {t.double().norm():.9g}")
'''


def program_of(gm: fx.GraphModule) -> str:
    """Return a Python file that runs a traced graph, rewritten or not, that is not yet lowered."""
    imports: dict[str, str] = {}
    classes: list[str] = []
    _add_class(gm, "Graph", classes, imports)
    lines = "".join(f"{line}\n" for line in sorted(imports.values()))
    return "\n".join([_HEADER.format(imports=lines), *classes, _make_inputs(gm), _FOOTER])


def _add_class(gm: fx.GraphModule, name: str, classes: list[str], imports: dict[str, str]) -> None:
    """Append the source of a module that runs a graph, after those of its checkpointed bodies."""
    graph = _runnable(gm.graph)
    members = {str(node.target): node for node in graph.nodes if node.op in ("get_attr", "call_module")}
    body = []
    for target in members:
        member = operator.attrgetter(target)(gm)
        if isinstance(member, fx.GraphModule):
            _add_class(member, f"{name}_{target}", classes, imports)
            body.append(f"self.{target} = {name}_{target}()")
        else:
            body.append(f"self.{target} = {_constant(member, imports)}")
    code = graph.python_code("self")
    for alias, value in code.globals.items():
        if alias not in ("torch", "device", "inf", "nan", "NoneType"):
            imports[alias] = _import(alias, value)
    start = "\n".join(f"        {line}" for line in ["super().__init__()", *body])
    forward = "\n".join(f"    {line}" if line else "" for line in code.src.strip().split("\n"))
    classes.append(f"\nclass {name}(torch.nn.Module):\n    def __init__(self):\n{start}\n\n{forward}\n")


def _runnable(graph: fx.Graph) -> fx.Graph:
    """Return a copy that runs without the compiler: checkpointed bodies are called through `checkpoint`."""
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, {}))
    for node in copied.nodes:
        if node.target is torch.ops.higher_order.tag_activation_checkpoint:
            node.target = checkpoint
            node.kwargs = {"use_reentrant": False}
    return copied


def _constant(member: Any, imports: dict[str, str]) -> str:
    """Return source code for an attribute of the graph's module."""
    if isinstance(member, (DeferredHead, DeferredLoRAHead)):
        name = type(member).__name__
        imports[name] = _import(name, type(member))
        imports["DeferralStats"] = "from fastlora.logits.deferred_logits import DeferralStats"
        return f"{name}(DeferralStats())"
    if isinstance(member, torch.Tensor):
        made = _tensor(member)
        return f"torch.nn.Parameter({made})" if isinstance(member, nn.Parameter) else made
    return f"...  # {type(member).__name__}, which has no source: define it to run this file"


def _import(alias: str, value: Any) -> str:
    if isinstance(value, ModuleType):
        return f"import {value.__name__} as {alias}"
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
    if module is None or not name.isidentifier():
        return f"{alias} = ...  # {value!r}, which has no source: define it to run this file".replace("\n", " ")
    return f"from {module} import {name} as {alias}"


def _make_inputs(gm: fx.GraphModule) -> str:
    lines = ["", "def make_inputs():", "    torch.manual_seed(0)", "    return ["]
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            example = meta(node)
            made = repr(hint(node.meta.get("example_value"))) if example is None else _tensor(example)
            lines.append(f"        {made},  # {node.name}")
    return "\n".join([*lines, "    ]", ""])


def _tensor(example: torch.Tensor) -> str:
    """Return source code of a random tensor with the layout of an example."""
    shape, stride = ([hint(size) for size in sizes] for sizes in (example.shape, example.stride()))
    return f"tensor({shape}, {stride}, {example.dtype}, {str(example.device)!r}, {example.requires_grad})"
