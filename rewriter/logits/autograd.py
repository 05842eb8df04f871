"""The autograd functions of deferred logits: the head's product, rows of it, and the cross-entropy."""

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
from fastlora.kernels.core.execution import refuse_second_derivative, run_apart
from fastlora.kernels.formulas.token_loss import scaled_gradient, unit_gradient
from fastlora.kernels.ops import linear_cross_entropy, lora_linear
from fastlora.logits.cell import Cell
from fastlora.logits.deferred_logits import DeferredGradient, DeferredLogits, Tally
from fastlora.logits.deferred_ops import Parts, Stage, Step
from fastlora.logits.deferred_tensor import plain
from fastlora.logits.recipe import Recipe, Snapshot

PARAMETERS = ("x", "weight", "bias", "lora_a", "lora_b")
"""The tensors of a head's product, as the ops call them."""


class Product(torch.autograd.Function):
    """The deferred product of a head."""

    @staticmethod
    def forward(ctx: Any, recipe: Recipe, tally: Tally, *tensors: torch.Tensor | None) -> DeferredLogits:
        needs = ctx.needs_input_grad[2:]
        ctx.save_for_backward(*(_read_by_backward(tensors, needs) if recipe.adapter is None else tensors))
        ctx.dtypes, ctx.stage = (recipe.base_dtype, recipe.dtype), Stage()
        ctx.adapter = None if recipe.adapter is None else recipe.adapter[2:]
        ctx.own_dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.set_materialize_grads(False)
        tally.deferred += 1
        ctx.tally = tally
        snapshot = Snapshot(recipe.tensors, tally.moment())

        def compute() -> torch.Tensor:
            snapshot.check(look=snapshot.moment != tally.moment())
            tally.materialized[_reader()] += 1
            return recipe.product()

        meta = torch.empty(recipe.shape, dtype=recipe.dtype, device="meta")
        return DeferredLogits.of(Cell(compute), meta, recipe, ctx.stage, snapshot, tally)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> Any:
        needs = ctx.needs_input_grad[2:]
        ctx.tally.backwards += 1
        if gradient is None:
            return (None,) * (2 + len(needs))
        saved = ctx.saved_tensors  # which are gone after a backward, and must not have been written to
        parts = gradient.take_parts(ctx.stage) if isinstance(gradient, DeferredGradient) else None
        if parts is None and ctx.adapter is None:
            parts = _product_gradients(_value(gradient), saved, needs, ctx.own_dtypes)
        elif parts is None:
            parts = _adapted_gradients(_value(gradient), saved, needs, ctx.dtypes, *ctx.adapter)
        return None, None, *(parts.get(name) if need else None for name, need in zip(PARAMETERS, needs, strict=True))


def _read_by_backward(tensors: Sequence[Any], needs: Sequence[bool]) -> list[Any]:
    """Return what the backward of a linear layer reads: hidden states and weight, as far as they are needed."""
    return [tensors[0] if needs[1] else None, tensors[1] if needs[0] else None]


def _value(gradient: torch.Tensor) -> torch.Tensor:
    """Return a gradient as a backward reads it: with its history if the backward is differentiated itself."""
    value: torch.Tensor = gradient if torch.is_grad_enabled() else plain(gradient)
    return value


def _product_gradients(g: torch.Tensor, saved: Sequence[Any], needs: Sequence[bool], dtypes: Sequence[Any]) -> Parts:
    """Return the gradients of a linear layer as autograd computes them; differentiable."""
    hidden, weight = saved
    parts: Parts = {}
    rows = g.reshape(-1, g.shape[-1])
    if needs[0]:
        parts["x"] = (g @ weight.to(g.dtype)).to(dtypes[0])
    if needs[1]:
        parts["weight"] = (rows.t() @ hidden.reshape(-1, hidden.shape[-1]).to(g.dtype)).to(dtypes[1])
    if needs[2]:
        parts["bias"] = rows.sum(0).to(dtypes[2])
    return parts


def _adapted_gradients(
    g: torch.Tensor,
    saved: Sequence[Any],
    needs: Sequence[bool],
    dtypes: tuple[torch.dtype, torch.dtype],
    scaling: float,
    lora_dtype: torch.dtype,
) -> Parts:
    """Return the gradients of a linear layer with an adapter."""
    refuse_second_derivative(lora_linear.name)
    values = lora_linear.order({
        **dict(zip(PARAMETERS, saved, strict=True)), "scaling": scaling, "lora_dtype": lora_dtype,
        "base_dtype": dtypes[0], "out_dtype": dtypes[1],
    })  # fmt: skip
    wanted, names = dict(zip(PARAMETERS, needs, strict=True)), lora_linear.leaves.names
    _, kept, backward = run_apart(lora_linear, values, [wanted.get(name, False) for name in names])
    found = backward(kept, [g.contiguous()])
    return {name: t for name, t in zip(names, found, strict=True) if t is not None}


class CrossEntropy(torch.autograd.Function):
    """The cross-entropy of deferred logits (T, V), which does not compute them."""

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits, labels: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        recipe, names, tally = logits.recipe, linear_cross_entropy.leaves.names, logits.tally
        dtype = recipe.dtype
        if torch.is_autocast_enabled(logits.device.type):  # under which losses are computed in float32
            dtype = torch.promote_types(dtype, torch.float32)
        ctx.meta, ctx.stage, ctx.options, ctx.dry = logits.meta, logits.stage, options, tally.dry
        ctx.source = recipe, logits.snapshot, weakref.ref(logits.cell)
        ctx.set_materialize_grads(False)
        if tally.dry:
            tally.fused += 1
            ctx.save_for_backward(labels)
            return recipe.hidden.new_zeros(labels.shape if options["reduction"] == "none" else (), dtype=dtype)
        needs = [ctx.needs_input_grad[0] and name in recipe.trained for name in names]
        values = recipe.loss_arguments(labels, dtype, **options)
        (loss,), saved, ctx.differentiate = run_apart(linear_cross_entropy, values, needs)
        ctx.save_for_backward(labels, *saved)
        tally.fused += 1
        assert loss is not None
        return loss

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None) -> Any:
        if g is None:
            return None, None, None
        refuse_second_derivative(linear_cross_entropy.name)
        labels, *saved = ctx.saved_tensors
        recipe, snapshot, seen = ctx.source
        cell = seen()
        known = cell if cell is not None and cell.is_computed else None
        parts = _zeros(recipe) if ctx.dry else _named(ctx.differentiate(saved, [g]))
        compute = partial(_logits_gradient, recipe, snapshot, known, labels.clone(), g.clone(), ctx.meta, ctx.options)
        if is_last_backward():
            ctx.source = None
        return DeferredGradient.of(Cell(compute), ctx.meta, parts, ctx.stage, g.device), None, None


def _named(found: Sequence[torch.Tensor | None]) -> Parts:
    return {n: t for n, t in zip(linear_cross_entropy.leaves.names, found, strict=True) if t is not None}


def _zeros(recipe: Recipe) -> Parts:
    low = (None, None) if recipe.adapter is None else recipe.adapter[:2]
    tensors = zip(PARAMETERS, (recipe.hidden, recipe.weight, recipe.bias, *low), strict=True)
    return {name: torch.zeros_like(t) for name, t in tensors if t is not None and name in recipe.trained}


def _logits_gradient(
    recipe: Recipe,
    snapshot: Snapshot,
    known: Cell | None,
    labels: torch.Tensor,
    g: torch.Tensor,
    meta: torch.Tensor,
    options: dict[str, Any],
) -> torch.Tensor:
    """Return the gradient of the loss for the logits, from their values if these are computed, or from the recipe."""
    if known is not None and not known.memory.is_shared:
        logits = known.get()
    else:
        snapshot.check(look=True)
        logits = recipe.logits()
    unit = unit_gradient(logits.reshape(meta.shape), labels, **options)
    return scaled_gradient(unit, g, labels != options["ignore_index"]).to(meta.dtype)


class Rows(torch.autograd.Function):
    """Rows of deferred logits. Tensors in the index are arguments as well, so that autograd checks their versions."""

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits, index: tuple[Any, ...], *tensors: torch.Tensor) -> DeferredLogits:
        hidden, lead = logits.recipe.hidden, logits.shape[:-1]
        ctx.shape, ctx.hidden_shape = logits.shape, hidden.shape
        ctx.parent, ctx.stage = logits.stage, Stage(logits.stage, ("rows",), None, logits.stage.rows_only)
        ctx.save_for_backward(*tensors)
        taken = torch.arange(lead.numel(), device=hidden.device).reshape(lead)[index]
        ctx.taken = taken.reshape(-1)
        recipe = replace(logits.recipe, hidden=hidden.reshape(-1, hidden.shape[-1])[taken])
        meta = torch.empty(recipe.shape, dtype=logits.dtype, device="meta")

        def pick(value: torch.Tensor) -> torch.Tensor:
            return value.reshape(-1, value.shape[-1])[taken]

        return logits.then(logits.cell.derive(pick), meta, Step(recipe, ctx.stage))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        shape, taken, unused = ctx.shape, ctx.taken, (None,) * (1 + len(ctx.saved_tensors))

        def put_back(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
            rows = value.new_zeros(shape[:-1].numel(), shape[-1])
            return rows.index_put((taken,), value.reshape(-1, shape[-1]), accumulate=True).reshape(shape)

        parts = gradient.parts_at(ctx.stage) if isinstance(gradient, DeferredGradient) else None
        if parts is None:
            return put_back(_value(gradient), shape), *unused
        assert isinstance(gradient, DeferredGradient)
        if "x" in parts:
            parts = {**parts, "x": put_back(parts["x"], ctx.hidden_shape)}
        cell = gradient.cell.derive(lambda value: put_back(value, shape))
        meta = gradient.meta.new_empty(shape)
        return DeferredGradient.of(cell, meta, parts, ctx.parent, gradient.device, gradient.taken), *unused


def _reader() -> str:
    """Return the innermost line outside of PyTorch and fastlora, which read the logits."""
    here = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(here) and "/torch/" not in frame.filename:
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    return "an unknown line"
