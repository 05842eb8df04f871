"""Registration of an op as two opaque, functional `torch.library` operators, connected by an autograd function.

In this form it works in eager mode, under AOTAutograd and under Inductor, since nothing traces through it, and exactly
the arguments of the backward operator are saved.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from fastlora.compat import calls
from fastlora.kernels.core.execution import (
    after_forward,
    differentiate_by_operator,
    refuse_second_derivative,
    run_backward,
    run_forward,
)
from fastlora.kernels.core.semantic_op import SemanticOp

KERNELS = Path(__file__).parents[1]
REGISTERED: dict[Any, SemanticOp] = {}
"""Every op by its `target`, the operator that nodes of a graph call."""


def register_op(name: str, **declaration: Any) -> SemanticOp:
    """Declare and register a semantic op; `SemanticOp` documents the parts of a declaration.

    The operators are `fastlora_<digest>::name` and `fastlora_<digest>::name_backward`. The digest is of the sources
    that define the op, since AOTAutograd's cache keys on operator names and would serve a stale backward.

    Raises:
        ValueError: if the schema has defaults or mutates, or another op has this name.
    """
    op = SemanticOp(name, **declaration)
    namespace = _namespace(declaration["forward"])
    if any(other.name == name for other in REGISTERED.values()):
        raise ValueError(f"name={name!r} is taken by another op; choose a name of your own, such as 'mypackage_{name}'")
    library = _library(namespace)
    saved = "".join(f", Tensor?{'[]' * a.is_list} {a.name}" for a in op.saved)
    dtypes = "".join(f", ScalarType? {each}_dtype" for each in op.saved_if)
    constants = "".join(f", {a.type} {a.name}" for a in op.constants)
    backward_schema = f"(Tensor?[] grads, bool[] needs{saved}{dtypes}{constants}) -> Tensor[]"
    schema = op.schema.replace(") ->", ", bool[] needs) ->", 1) if op.policy.grads_in_forward else op.schema
    runs = {name: (schema, partial(run_forward, op)), f"{name}_backward": (backward_schema, partial(run_backward, op))}
    for each, (text, run) in runs.items():
        library.define(each + text)
        library.impl(each, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{each}", partial(run, fake=True), lib=library)
    library.impl(name, partial(_differentiable, op), "Autograd")
    op.target, op.backward_target = (getattr(getattr(torch.ops, namespace), each).default for each in runs)
    REGISTERED[op.target] = op
    return op


@cache
def _library(namespace: str) -> torch.library.Library:
    return torch.library.Library(namespace, "DEF")


def _namespace(forward: Callable[..., Any]) -> str:
    """Return the namespace of an op with this forward: a common one for this package, otherwise that of its file."""
    code = inspect.unwrap(forward.func if isinstance(forward, partial) else forward).__code__
    source = Path(code.co_filename)
    if not source.is_file():  # such as in a notebook
        return f"fastlora_{hashlib.sha256(code.co_code).hexdigest()[:10]}"
    return f"fastlora_{_cached_digest(KERNELS if source.is_relative_to(KERNELS) else source)}"


def digest(path: Path) -> str:
    """Return a digest of a file, or of all Python files of a folder."""
    sources = sorted(path.rglob("*.py")) if path.is_dir() else [path]
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:10]


_cached_digest = cache(digest)


def _differentiable(op: SemanticOp, *values: Any) -> Any:
    """Run the op, with autograd if a gradient is needed; the kernel of the Autograd dispatch key."""
    tensors = op.leaves.flat(values)
    needed = any(t is not None and t.requires_grad for t in tensors)
    if needed and torch.is_grad_enabled() and not op.is_constant:
        results = op.result_leaves.grouped(_Dispatched.apply(op, values, *tensors))
        return tuple(results) if len(op.result_names) > 1 else results[0]
    with calls.below_autograd():
        return op.target(*values)


class _Dispatched(torch.autograd.Function):
    """Connects an op's forward and backward operators; takes the op's tensor leaves as a flat list."""

    @staticmethod
    def forward(ctx: Any, op: SemanticOp, values: tuple[Any, ...], *tensors: torch.Tensor | None) -> Any:
        needs = ctx.needs_input_grad[2:]
        own = values[: len(op.names)]
        with calls.below_autograd():
            results = op.as_tuple(op.target(*own, *([needs] if op.policy.grads_in_forward else [])))
        saved, ctx.differentiate = after_forward(op, needs, own, results)
        ctx.save_for_backward(*saved)
        outputs, residuals = op.output_leaves.flat(results), op.residual_leaves.flat(results[len(op.outputs) :])
        ctx.outputs = len(outputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*residuals)
        return (*outputs, *residuals)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        refuse_second_derivative(ctx.differentiate.op.name)
        incoming = list(grads[: ctx.outputs])
        if all(g is None for g in incoming):
            return (None,) * len(ctx.needs_input_grad)
        return (None, None, *ctx.differentiate(ctx.saved_tensors, incoming, differentiate_by_operator))
