"""The autograd functions of deferred logits: the head's linear layer, rows of its output, and the cross-entropy."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastlora.kernels.core.dispatch import is_last_backward
from fastlora.kernels.core.execution import refuse_second_derivative, run_without_autograd
from fastlora.kernels.formulas.token_loss import scaled_gradient, unit_gradient
from fastlora.kernels.ops import linear_cross_entropy, lora_linear
from fastlora.logits.deferred_logits import DeferralStats, DeferredGradient, DeferredLogits
from fastlora.logits.deferred_ops import DeferredOutput, Grads, OpNode
from fastlora.logits.deferred_tensor import plain
from fastlora.logits.lazy_value import LazyValue
from fastlora.logits.logits_expr import LogitsExpr, Snapshot

PARAMETERS = ("x", "weight", "bias", "lora_a", "lora_b")
"""The tensors of the head's linear layer, by the argument names of the ops."""


class DeferredLinear(torch.autograd.Function):
    """Defers `linear(x, weight, bias)` of the head, with its adapter if there is one."""

    @staticmethod
    def forward(ctx: Any, expr: LogitsExpr, stats: DeferralStats, *tensors: torch.Tensor | None) -> DeferredLogits:
        needs = ctx.needs_input_grad[2:]
        ctx.save_for_backward(*(_read_by_backward(tensors, needs) if expr.adapter is None else tensors))
        ctx.compute_dtypes, ctx.node = (expr.base_dtype, expr.dtype), OpNode()
        ctx.adapter = None if expr.adapter is None else expr.adapter[2:]
        ctx.grad_dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        stats.deferred += 1
        ctx.stats = stats
        snapshot = Snapshot(expr.tensors, stats.call_counts())

        def compute() -> torch.Tensor:
            snapshot.check(check_values=snapshot.taken_at != stats.call_counts())
            stats.materialized[_reading_line()] += 1
            return expr.linear_output()

        meta = torch.empty(expr.shape, dtype=expr.dtype, device="meta")
        return DeferredLogits.of(LazyValue(compute), meta, expr, ctx.node, snapshot, stats)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> Any:
        needs = ctx.needs_input_grad[2:]
        ctx.stats.backwards += 1
        if gradient is None:
            return (None,) * (2 + len(needs))
        saved = ctx.saved_tensors  # also when unused: raises if they were freed or written to
        grads = gradient.take_grads(ctx.node) if isinstance(gradient, DeferredGradient) else None
        if grads is None and ctx.adapter is None:
            grads = _linear_grads(_value(gradient), saved, needs, ctx.grad_dtypes)
        elif grads is None:
            grads = _lora_linear_grads(_value(gradient), saved, needs, ctx.compute_dtypes, *ctx.adapter)
        return None, None, *(grads.get(name) if need else None for name, need in zip(PARAMETERS, needs, strict=True))


def _read_by_backward(tensors: Sequence[Any], needs: Sequence[bool]) -> list[Any]:
    """Return hidden states and weight, with None for what the backward of a linear layer does not read."""
    return [tensors[0] if needs[1] else None, tensors[1] if needs[0] else None]


def _value(gradient: torch.Tensor) -> torch.Tensor:
    """Return the elements of a gradient, with its history if the backward is differentiated itself."""
    value: torch.Tensor = gradient if torch.is_grad_enabled() else plain(gradient)
    return value


def _linear_grads(g: torch.Tensor, saved: Sequence[Any], needs: Sequence[bool], dtypes: Sequence[Any]) -> Grads:
    """Return the gradients of a linear layer as autograd computes them; differentiable."""
    hidden, weight = saved
    grads: Grads = {}
    rows = g.reshape(-1, g.shape[-1])
    if needs[0]:
        grads["x"] = (g @ weight.to(g.dtype)).to(dtypes[0])
    if needs[1]:
        grads["weight"] = (rows.t() @ hidden.reshape(-1, hidden.shape[-1]).to(g.dtype)).to(dtypes[1])
    if needs[2]:
        grads["bias"] = rows.sum(0).to(dtypes[2])
    return grads


def _lora_linear_grads(
    g: torch.Tensor,
    saved: Sequence[Any],
    needs: Sequence[bool],
    dtypes: tuple[torch.dtype, torch.dtype],
    scaling: float,
    lora_dtype: torch.dtype,
) -> Grads:
    """Return the gradients of a linear layer with an adapter."""
    refuse_second_derivative(lora_linear.name)
    values = lora_linear.order({
        **dict(zip(PARAMETERS, saved, strict=True)), "scaling": scaling, "lora_dtype": lora_dtype,
        "base_dtype": dtypes[0], "out_dtype": dtypes[1],
    })  # fmt: skip
    needed, names = dict(zip(PARAMETERS, needs, strict=True)), lora_linear.leaves.names
    _, residuals, backward = run_without_autograd(lora_linear, values, [needed.get(name, False) for name in names])
    grads = backward(residuals, [g.contiguous()])
    return {name: grad for name, grad in zip(names, grads, strict=True) if grad is not None}


class CrossEntropy(torch.autograd.Function):
    """The cross-entropy of deferred logits (T, V), which does not compute them."""

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits, labels: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        expr, names, stats = logits.expr, linear_cross_entropy.leaves.names, logits.stats
        dtype = expr.dtype
        if torch.is_autocast_enabled(logits.device.type):  # autocast computes losses in float32
            dtype = torch.promote_types(dtype, torch.float32)
        ctx.meta, ctx.node, ctx.options, ctx.dry = logits.meta, logits.node, options, stats.dry
        ctx.source = expr, logits.snapshot, weakref.ref(logits.lazy)
        ctx.set_materialize_grads(False)
        if stats.dry:
            stats.fused += 1
            ctx.save_for_backward(labels)
            return expr.hidden.new_zeros(labels.shape if options["reduction"] == "none" else (), dtype=dtype)
        needs = [ctx.needs_input_grad[0] and name in expr.requires_grad for name in names]
        values = expr.loss_arguments(labels, dtype, **options)
        (loss,), saved, ctx.differentiate = run_without_autograd(linear_cross_entropy, values, needs)
        ctx.save_for_backward(labels, *saved)
        stats.fused += 1
        assert loss is not None
        return loss

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None) -> Any:
        if g is None:
            return None, None, None
        refuse_second_derivative(linear_cross_entropy.name)
        labels, *saved = ctx.saved_tensors
        expr, snapshot, lazy_ref = ctx.source
        lazy = lazy_ref()
        computed = lazy if lazy is not None and lazy.is_computed else None
        grads = _zero_grads(expr) if ctx.dry else _by_name(ctx.differentiate(saved, [g]))
        compute = partial(_logits_grad, expr, snapshot, computed, labels.clone(), g.clone(), ctx.meta, ctx.options)
        if is_last_backward():
            ctx.source = None
        return DeferredGradient.of(LazyValue(compute), ctx.meta, grads, ctx.node, g.device), None, None


def _by_name(grads: Sequence[torch.Tensor | None]) -> Grads:
    return {n: grad for n, grad in zip(linear_cross_entropy.leaves.names, grads, strict=True) if grad is not None}


def _zero_grads(expr: LogitsExpr) -> Grads:
    matrices = (None, None) if expr.adapter is None else expr.adapter[:2]
    tensors = zip(PARAMETERS, (expr.hidden, expr.weight, expr.bias, *matrices), strict=True)
    return {name: torch.zeros_like(t) for name, t in tensors if t is not None and name in expr.requires_grad}


def _logits_grad(
    expr: LogitsExpr,
    snapshot: Snapshot,
    computed: LazyValue | None,
    labels: torch.Tensor,
    g: torch.Tensor,
    meta: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    """Return the gradient of the loss for the logits (T, V), from the logits if they are computed, else from `expr`."""
    if computed is not None and not computed.storage.is_shared:
        logits = computed.get()
    else:
        snapshot.check(check_values=True)
        logits = expr.logits()
    unit = unit_gradient(logits.reshape(meta.shape), labels, **options)
    return scaled_gradient(unit, g, labels != options["ignore_index"]).to(meta.dtype)


class SelectRows(torch.autograd.Function):
    """Indexes rows of deferred logits. Tensors in the index are also arguments, so that autograd checks their
    versions."""

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits, index: tuple[Any, ...], *tensors: torch.Tensor) -> DeferredLogits:
        hidden, row_shape = logits.expr.hidden, logits.shape[:-1]
        ctx.shape, ctx.hidden_shape = logits.shape, hidden.shape
        ctx.parent = logits.node
        ctx.node = OpNode(logits.node, ("rows",), only_rows_changed=logits.node.only_rows_changed)
        ctx.save_for_backward(*tensors)
        rows = torch.arange(row_shape.numel(), device=hidden.device).reshape(row_shape)[index]
        ctx.rows = rows.reshape(-1)
        expr = replace(logits.expr, hidden=hidden.reshape(-1, hidden.shape[-1])[rows])
        meta = torch.empty(expr.shape, dtype=logits.dtype, device="meta")

        def select(value: torch.Tensor) -> torch.Tensor:
            return value.reshape(-1, value.shape[-1])[rows]

        return logits.then(logits.lazy.derive(select), meta, DeferredOutput(expr, ctx.node))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        shape, rows, no_grads = ctx.shape, ctx.rows, (None,) * (1 + len(ctx.saved_tensors))

        def scatter(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
            zeros = value.new_zeros(shape[:-1].numel(), shape[-1])
            return zeros.index_put((rows,), value.reshape(-1, shape[-1]), accumulate=True).reshape(shape)

        grads = gradient.grads_for(ctx.node) if isinstance(gradient, DeferredGradient) else None
        if grads is None:
            return scatter(_value(gradient), shape), *no_grads
        assert isinstance(gradient, DeferredGradient)
        if "x" in grads:
            grads = {**grads, "x": scatter(grads["x"], ctx.hidden_shape)}
        lazy = gradient.lazy.derive(lambda value: scatter(value, shape))
        meta = gradient.meta.new_empty(shape)
        return DeferredGradient.of(lazy, meta, grads, ctx.parent, gradient.device, gradient.taken_storages), *no_grads


def _reading_line() -> str:
    """Return `file:line` of the innermost frame outside of PyTorch and this package: what has read the logits."""
    this_package = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(this_package) and "/torch/" not in frame.filename:
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    return "an unknown line"
