"""What makes deferred logits and what is made of them: the autograd functions around a head and its loss."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.errors import FastLoRAError
from fastlora.kernels.core.dispatch import is_last_backward
from fastlora.kernels.core.execution import refuse_second_derivative, run_apart
from fastlora.kernels.formulas.linear_cross_entropy import scaled_gradient, unit_gradient
from fastlora.kernels.ops import linear_cross_entropy, lora_linear
from fastlora.logits.deferred_logits import DeferredGradient, DeferredLogits, Tally
from fastlora.logits.deferred_ops import Parts, Stage, Step
from fastlora.logits.deferred_tensor import Cell, plain
from fastlora.logits.recipe import Adapter, Recipe, Snapshot

_TENSOR: Any = torch.Tensor
_PARAMETERS = ("x", "weight", "bias", "lora_a", "lora_b")


class Product(torch.autograd.Function):
    """The head's product, deferred."""

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
        return None, None, *(parts.get(name) if need else None for name, need in zip(_PARAMETERS, needs, strict=True))


def _read_by_backward(tensors: Sequence[Any], needs: Sequence[bool]) -> list[Any]:
    """What the backward of a linear layer reads of hidden states and weight."""
    return [tensors[0] if needs[1] else None, tensors[1] if needs[0] else None]


def _value(gradient: torch.Tensor) -> torch.Tensor:
    """A gradient as the operations of a backward are to read it: with its history, if they are to be differentiated."""
    value: torch.Tensor = gradient if torch.is_grad_enabled() else plain(gradient)
    return value


def _product_gradients(g: torch.Tensor, saved: Sequence[Any], needs: Sequence[bool], dtypes: Sequence[Any]) -> Parts:
    """The gradients of a linear layer, as autograd has them; differentiable."""
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
    """The gradients of a linear layer with an adapter."""
    refuse_second_derivative(lora_linear.name)
    values = lora_linear.order({
        **dict(zip(_PARAMETERS, saved, strict=True)), "scaling": scaling, "lora_dtype": lora_dtype,
        "base_dtype": dtypes[0], "out_dtype": dtypes[1],
    })  # fmt: skip
    wanted, names = dict(zip(_PARAMETERS, needs, strict=True)), lora_linear.leaves.names
    _, kept, backward = run_apart(lora_linear, values, [wanted.get(name, False) for name in names])
    found = backward(kept, [g.contiguous()])
    return {name: t for name, t in zip(names, found, strict=True) if t is not None}


class CrossEntropy(torch.autograd.Function):
    """The cross-entropy of deferred logits (T, V), without these."""

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits, labels: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        recipe, names, tally = logits.recipe, linear_cross_entropy.leaves.names, logits.tally
        dtype = recipe.dtype
        if torch.is_autocast_enabled(logits.device.type):  # which takes losses in float32
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
    tensors = zip(_PARAMETERS, (recipe.hidden, recipe.weight, recipe.bias, *low), strict=True)
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
    """The gradient of the loss for the logits, of the logits if they were known in the backward, or else of their
    recipe."""
    if known is not None and not known.memory.is_shared:
        logits = known.get()
    else:
        snapshot.check(look=True)
        logits = recipe.logits()
    unit = unit_gradient(logits.reshape(meta.shape), labels, **options)
    return scaled_gradient(unit, g, labels != options["ignore_index"]).to(meta.dtype)


class Rows(torch.autograd.Function):
    """Rows of deferred logits by an index that has tensors, which are given beside it for their versions."""

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


# -- functions with a deferred form ------------------------------------------------------------------------------------


def _is_deferred(t: Any) -> bool:
    return isinstance(t, DeferredLogits) and not t.cell.memory.is_shared and not torch.is_inference_mode_enabled()


def _cross_entropy(
    input: Any, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Any:  # fmt: skip
    plainly = weight is None and size_average is None and reduce is None and reduction in ("mean", "sum", "none")
    if not plainly or not _is_deferred(input) or input.dim() != 2 or type(target) is not torch.Tensor:
        return NotImplemented
    if (problem := input.snapshot.problem(look=input.tally.has_gone_back(input.snapshot.moment))) is not None:
        if input.cell.is_computed:  # what is left is the value
            return NotImplemented
        raise FastLoRAError(problem)
    if target.dtype not in (torch.int64, torch.uint8) or target.device != input.device:
        return NotImplemented
    if target.shape != input.shape[:1] or not input.numel() or not 0.0 <= label_smoothing <= 1.0:
        return NotImplemented
    options = {"ignore_index": ignore_index, "reduction": reduction, "label_smoothing": label_smoothing}
    return CrossEntropy.apply(input, target.to(torch.int64), options)


def _rows(input: Any, index: Any) -> Any:
    if not _is_deferred(input):
        return NotImplemented
    parts = index if isinstance(index, tuple) else (index,)
    if not any(isinstance(part, torch.Tensor) for part in parts):
        return NotImplemented
    rows = _without_last(parts, input.dim())
    return (
        NotImplemented if rows is None else Rows.apply(input, rows, *(t for t in rows if isinstance(t, torch.Tensor)))
    )


def _without_last(parts: tuple[Any, ...], dims: int) -> tuple[Any, ...] | None:
    """An index that leaves the last dimension alone, without what says so; None for another."""
    taken = 0
    for i, part in enumerate(parts):
        if part is Ellipsis:
            rest = parts[i + 1 :]
            return parts[:i] if rest in ((), (slice(None),)) and taken < dims else None
        if isinstance(part, torch.Tensor):
            plainly = type(part) is torch.Tensor and part.dtype in (torch.bool, torch.int64)
            if not plainly or not part.dim():  # a number, which makes a view
                return None
            taken += part.dim() if part.dtype is torch.bool else 1
        elif isinstance(part, (int, slice)) and not isinstance(part, bool):
            taken += 1
        else:
            return None
        if taken == dims and part == slice(None) and i == len(parts) - 1:
            return parts[:-1]
    return parts if taken < dims else None


DeferredLogits._overrides = {
    F.cross_entropy: _cross_entropy,
    _TENSOR.__getitem__: _rows,
}


# -- making them -------------------------------------------------------------------------------------------------------


def defer(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    base_dtype: torch.dtype,
    dtype: torch.dtype,
    tally: Tally,
    adapter: Adapter | None = None,
) -> DeferredLogits:
    """Return the deferred `linear(hidden, weight, bias)`, computed in `base_dtype`, with an adapter if there is one."""
    low_rank = (None, None) if adapter is None else adapter[:2]
    tensors = (hidden, weight, bias, *low_rank)
    cut: list[Any] = [None if t is None else t.detach() for t in tensors]
    low = None if adapter is None else adapter._replace(lora_a=cut[3], lora_b=cut[4])
    trained = frozenset(n for n, t in zip(_PARAMETERS, tensors, strict=True) if t is not None and t.requires_grad)
    recipe = Recipe(cut[0], cut[1], cut[2], base_dtype, dtype, low, trained)
    made: DeferredLogits = Product.apply(recipe, tally, *tensors)
    return made


def product_dtype(hidden: Any, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.dtype | None:
    """Return the dtype of `F.linear(hidden, weight, bias)`, None if that cannot be deferred: it has no gradient, or
    would raise, or one of its tensors is no plain one."""
    if not can_defer(hidden, weight, bias):
        return None
    tensors = [t for t in (hidden, weight, bias) if t is not None]
    fits = hidden.dim() > 0 and hidden.shape[-1] == weight.shape[-1] and len({t.device for t in tensors}) == 1
    dtypes = {_cast(t) for t in tensors} if fits else set()
    return dtypes.pop() if len(dtypes) == 1 else None


def can_defer(*tensors: torch.Tensor | None) -> bool:
    """Whether a head's product of these tensors has a gradient, and all of them are plain ones."""
    found = [t for t in tensors if t is not None]
    plainly = all(type(t) in (torch.Tensor, nn.Parameter) and not t.is_meta and not t.is_inference() for t in found)
    return plainly and torch.is_grad_enabled() and any(t.requires_grad for t in found)


def _cast(t: torch.Tensor) -> torch.dtype:
    """The dtype that a linear layer reads a tensor in: autocast leaves float64 as it is."""
    device = t.device.type
    cast = torch.is_autocast_enabled(device) and t.is_floating_point() and t.dtype is not torch.float64
    return torch.get_autocast_dtype(device) if cast else t.dtype


def _reader() -> str:
    """The innermost line outside of PyTorch and fastlora: who read the logits."""
    here = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(here) and "/torch/" not in frame.filename:
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    return "an unknown line"
