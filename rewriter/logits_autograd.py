"""What makes deferred logits and what is made of them: the autograd functions around a head and its loss."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastlora.deferred import Cell, plain
from fastlora.kernels.apply import refuse_second_derivative, run_apart
from fastlora.kernels.dispatch import is_last_backward
from fastlora.kernels.linear_cross_entropy import scaled_gradient, unit_gradient
from fastlora.kernels.ops import linear_cross_entropy, lora_linear
from fastlora.logits import DeferredGradient, DeferredLogits, Tally
from fastlora.recipe import Adapter, Recipe, Snapshot
from fastlora.stages import Parts, Stage, Step

_TENSOR: Any = torch.Tensor
_PARAMETERS = ("x", "weight", "bias", "lora_a", "lora_b")


class Product(torch.autograd.Function):
    """The head's product, deferred."""

    @staticmethod
    def forward(
        ctx: Any,
        recipe: Recipe,
        tally: Tally,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor | None,
        lora_b: torch.Tensor | None,
    ) -> DeferredLogits:
        tensors = (hidden, weight, bias, lora_a, lora_b)
        ctx.save_for_backward(*tensors)
        ctx.dtypes, ctx.stage = (recipe.base_dtype, recipe.dtype), Stage()
        ctx.adapter = None if recipe.adapter is None else recipe.adapter[2:]
        ctx.set_materialize_grads(False)
        snapshot = Snapshot(recipe.tensors)

        def compute() -> torch.Tensor:
            snapshot.check()
            tally.materialized[_reader()] += 1
            return recipe.product()

        tally.deferred += 1
        meta = torch.empty(recipe.shape, dtype=recipe.dtype, device="meta")
        return DeferredLogits.of(Cell(compute), meta, recipe, ctx.stage, snapshot, tally)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor | None) -> Any:
        needs = ctx.needs_input_grad[2:]
        if gradient is None:
            return (None,) * (2 + len(needs))
        parts = gradient.at(ctx.stage) if isinstance(gradient, DeferredGradient) else None
        if parts is None:
            g, saved = plain(gradient), ctx.saved_tensors
            if ctx.adapter is None:
                parts = _product_gradients(g, saved, needs)
            else:
                parts = _adapted_gradients(g, saved, needs, ctx.dtypes, *ctx.adapter)
        return None, None, *(parts.get(name) if need else None for name, need in zip(_PARAMETERS, needs, strict=True))


def _product_gradients(g: torch.Tensor, saved: Sequence[Any], needs: Sequence[bool]) -> Parts:
    """The gradients of a linear layer, as autograd has them; differentiable."""
    hidden, weight, bias = saved[:3]
    parts: Parts = {}
    rows = g.reshape(-1, g.shape[-1])
    if needs[0]:
        parts["x"] = (g @ weight.to(g.dtype)).to(hidden.dtype)
    if needs[1]:
        parts["weight"] = (rows.t() @ hidden.reshape(-1, hidden.shape[-1]).to(g.dtype)).to(weight.dtype)
    if needs[2]:
        parts["bias"] = rows.sum(0).to(bias.dtype)
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
        recipe, names = logits.recipe, linear_cross_entropy.leaves.names
        dtype = recipe.dtype
        if torch.is_autocast_enabled(logits.device.type):  # which takes losses in float32
            dtype = torch.promote_types(dtype, torch.float32)
        logits.snapshot.check()
        logits.tally.fused += 1
        if logits.tally.dry:
            return logits.recipe.hidden.new_zeros((), dtype=dtype)
        values = recipe.loss_arguments(labels, dtype, **options)
        needs = [ctx.needs_input_grad[0] and name in recipe.trained for name in names]
        (loss,), saved, ctx.differentiate = run_apart(linear_cross_entropy, values, needs)
        ctx.save_for_backward(labels, *saved)
        ctx.unit = logits.cell.derive(lambda value: unit_gradient(value, labels, **options))
        ctx.meta, ctx.stage, ctx.ignore_index = logits.meta, logits.stage, options["ignore_index"]
        ctx.set_materialize_grads(False)
        assert loss is not None
        return loss

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor | None) -> Any:
        if g is None:
            return None, None, None
        refuse_second_derivative(linear_cross_entropy.name)
        labels, *saved = ctx.saved_tensors
        found = ctx.differentiate(saved, [g])
        names = linear_cross_entropy.leaves.names
        parts = {name: t for name, t in zip(names, found, strict=True) if t is not None}
        kept, dtype = labels != ctx.ignore_index, ctx.meta.dtype
        cell = ctx.unit.derive(lambda unit: scaled_gradient(unit, g, kept).to(dtype))
        if is_last_backward():
            ctx.unit = None
        return DeferredGradient.of(cell, ctx.meta, parts, ctx.stage, g.device), None, None


class Rows(torch.autograd.Function):
    """Rows of deferred logits by an index that has tensors."""

    @staticmethod
    def forward(ctx: Any, logits: DeferredLogits, index: tuple[Any, ...]) -> DeferredLogits:
        ctx.index, ctx.shape = index, logits.shape
        hidden = logits.recipe.hidden
        ctx.hidden_shape = hidden.shape
        ctx.parent, ctx.stage = logits.stage, Stage(logits.stage, ("rows",), None, logits.stage.rows_only)
        recipe = replace(logits.recipe, hidden=hidden[index])
        meta = torch.empty(recipe.shape, dtype=logits.dtype, device="meta")
        return logits.then(logits.cell.derive(lambda value: value[index]), meta, Step(recipe, ctx.stage))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        shape = ctx.shape
        number = torch.arange(shape[:-1].numel(), device=gradient.device).reshape(shape[:-1])
        taken = number[ctx.index].reshape(-1)

        def put_back(value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
            rows = value.new_zeros(number.numel(), shape[-1])
            return rows.index_put((taken,), value.reshape(-1, shape[-1]), accumulate=True).reshape(shape)

        parts = gradient.at(ctx.stage) if isinstance(gradient, DeferredGradient) else None
        if parts is None:
            return put_back(plain(gradient), shape), None
        assert isinstance(gradient, DeferredGradient)
        if "x" in parts:
            parts = {**parts, "x": put_back(parts["x"], ctx.hidden_shape)}
        cell = gradient.cell.derive(lambda value: put_back(value, shape))
        meta = gradient.meta.new_empty(shape)
        return DeferredGradient.of(cell, meta, parts, ctx.parent, gradient.device), None


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
    if input.cell.is_computed and input.snapshot.problem() is not None:  # what is left is the value
        return NotImplemented
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
    return NotImplemented if rows is None else Rows.apply(input, rows)


def _without_last(parts: tuple[Any, ...], dims: int) -> tuple[Any, ...] | None:
    """An index that leaves the last dimension alone, without what says so; None for another."""
    taken = 0
    for i, part in enumerate(parts):
        if part is Ellipsis:
            rest = parts[i + 1 :]
            return parts[:i] if rest in ((), (slice(None),)) and taken < dims else None
        if isinstance(part, torch.Tensor):
            plainly = type(part) is torch.Tensor and part.dtype in (torch.bool, torch.uint8, torch.int64)
            if not plainly or part.dtype is torch.uint8:
                return None
            taken += part.dim() if part.dtype is torch.bool else 1
        elif isinstance(part, (int, slice)) and not isinstance(part, bool):
            taken += 1
        else:
            return None
        if taken == dims and part == slice(None) and i == len(parts) - 1:
            return parts[:-1]
    return parts if taken < dims else None


def _index_select(input: Any, dim: int, index: torch.Tensor) -> Any:
    if not _is_deferred(input) or not isinstance(dim, int) or type(index) is not torch.Tensor or index.dim() != 1:
        return NotImplemented
    if not -input.dim() <= dim < input.dim():
        return NotImplemented
    return _rows(input, (*[slice(None)] * (dim % input.dim()), index))


DeferredLogits._overrides = {
    F.cross_entropy: _cross_entropy,
    _TENSOR.__getitem__: _rows,
    **dict.fromkeys((_TENSOR.index_select, torch.index_select), _index_select),
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


def is_worthwhile(hidden: Any, *parameters: torch.Tensor) -> bool:
    """Whether a head's product of plain tensors has a gradient, so that a loss is likely to be taken from it."""
    plain = type(hidden) is torch.Tensor and all(type(t) in (torch.Tensor, nn.Parameter) for t in parameters)
    tensors = (hidden, *parameters)
    return (
        plain
        and torch.is_grad_enabled()
        and any(t.requires_grad for t in tensors)
        and not any(t.is_inference() for t in tensors)
    )


def _reader() -> str:
    """The innermost line outside of PyTorch and fastlora: who read the logits."""
    here = str(Path(__file__).parent)
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(here) and "/torch/" not in frame.filename:
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    return "an unknown line"
