"""Which operations on deferred logits stay deferred, and how the gradient goes back through them.

An operation on logits that moves rows, scales or widens is one on the hidden states or on the recipe. Each leads to
another `Stage`, which knows its adjoint: the one operation that takes a gradient back to the stage before. Autograd
calls that very operation, so a deferred gradient recognises it by name and arguments; the gradients that it carries for
hidden states and parameters then only change rows. Whoever else calls it, in a hook say, gets the same value: a stage
stands for a value, not for a place in autograd's graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastlora.logits.recipe import Recipe

aten = torch.ops.aten
Parts = dict[str, torch.Tensor]
"""Gradients for hidden states (`x`, with the rows of a stage) and parameters, by the names of the ops."""
Key = tuple[Any, ...]
"""An operation and its arguments in one form for all spellings."""


@dataclass(frozen=True, eq=False)
class Stage:
    """What logits are between the head's product and a loss.

    Attributes:
        parent: the stage before; None for the product itself.
        adjoint: the operation that takes a gradient to the parent.
        move: what that does to the gradient of the hidden states.
        rows_only: whether this is the product but for the order of its rows.
        piece: of a stage that is one of several into which its parent was split, the position and the way of splitting.
    """

    parent: Stage | None = None
    adjoint: Key = ()
    move: Callable[[torch.Tensor], torch.Tensor] | None = None
    rows_only: bool = True
    piece: tuple[int, str] | None = None

    def back(self, parts: Parts) -> Parts:
        """Return the gradients for the parent's rows."""
        if self.move is None or "x" not in parts:
            return parts
        return {**parts, "x": self.move(parts["x"])}


@dataclass(frozen=True)
class Step:
    """What an operation leads to: the recipe and the stage of its result."""

    recipe: Recipe
    stage: Stage


Stepper = Callable[[Recipe, Stage, torch.Tensor, torch.Tensor, Sequence[Any]], "Step | None"]
"""Takes recipe, stage and meta tensor of the logits, the meta tensor of the result, and the operation's arguments."""

RESHAPES = {
    aten.view.default, aten._unsafe_view.default, aten._reshape_alias.default, aten.reshape.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
}  # fmt: skip
SAME = {aten.detach.default, aten.alias.default}
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int}


def _reshaped(recipe: Recipe, stage: Stage, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    if result.dim() == 0 or result.shape[-1] != meta.shape[-1]:
        return None
    hidden = recipe.hidden
    moved = hidden.reshape(*result.shape[:-1], hidden.shape[-1])
    adjoint = ("reshape", tuple(meta.shape))
    return _rows(recipe, stage, moved, adjoint, lambda dx: dx.reshape(hidden.shape))


def _sliced(recipe: Recipe, stage: Stage, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    given = dict(enumerate(args))
    dim = given.get(0, 0) % meta.dim()
    bounds = _bounds(meta.shape[dim], given.get(1), given.get(2), given.get(3, 1))
    if dim == meta.dim() - 1:
        return None
    hidden = recipe.hidden
    adjoint = ("slice", tuple(meta.shape), dim, *bounds)
    return _rows(
        recipe, stage, aten.slice(hidden, dim, *bounds), adjoint,
        lambda dx: aten.slice_backward(dx, list(hidden.shape), dim, *bounds),
    )  # fmt: skip


def _selected(recipe: Recipe, stage: Stage, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    dim = args[0] % meta.dim()
    if dim == meta.dim() - 1:
        return None
    hidden, index = recipe.hidden, args[1] % meta.shape[dim]
    adjoint = ("select", tuple(meta.shape), dim, index)
    return _rows(
        recipe, stage, hidden.select(dim, index), adjoint,
        lambda dx: aten.select_backward(dx, list(hidden.shape), dim, index),
    )  # fmt: skip


def _permuted(recipe: Recipe, stage: Stage, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    order = _order(meta.dim(), args)
    if order[-1] != meta.dim() - 1:
        return None
    inverse = tuple(order.index(dim) for dim in range(len(order)))
    return _rows(recipe, stage, recipe.hidden.permute(order), ("permute", inverse), lambda dx: dx.permute(inverse))


def _multiplied(recipe: Recipe, stage: Stage, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    factor = args[0]
    return _scaled(recipe, stage, ("mul", factor), factor) if _is_scale(meta, result, args) else None


def _divided(recipe: Recipe, stage: Stage, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    divisor = args[0]
    return _scaled(recipe, stage, ("div", divisor), 1.0 / divisor) if _is_scale(meta, result, args) else None


def _scaled(recipe: Recipe, stage: Stage, adjoint: Key, factor: float) -> Step:
    return Step(recipe.scaled(factor), Stage(stage, adjoint, rows_only=False))


def _squashed(recipe: Recipe, stage: Stage, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    if recipe.squashed:
        return None
    after = Stage(stage, ("tanh", stage), rows_only=False)  # no other stage has this parent and this operation
    return Step(replace(recipe, squashed=True), after)


def _cast(recipe: Recipe, stage: Stage, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    if not result.is_floating_point() or torch.promote_types(meta.dtype, result.dtype) != result.dtype:
        return None
    if meta.dtype == result.dtype:
        return Step(recipe, stage)
    return Step(replace(recipe, dtype=result.dtype), Stage(stage, ("cast", meta.dtype), rows_only=False))


def _plus(recipe: Recipe, stage: Stage, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Any:
    """A bias, if the head has none and nothing but rows has changed. A gradient goes through a sum as it is."""
    other = args[0]
    if len(args) > 1 or recipe.bias is not None or recipe.adapter is not None or not recipe.is_product:
        return None
    if type(other) not in (torch.Tensor, torch.nn.Parameter) or other.is_inference():
        return None
    if (other.dtype, other.device, result.shape) != (recipe.dtype, recipe.hidden.device, meta.shape):
        return None
    if not 0 < other.dim() <= meta.dim():
        return None
    if other.shape[-1] != meta.shape[-1] or other.numel() != meta.shape[-1]:
        return None
    trained = recipe.trained | {"bias"} if other.requires_grad else recipe.trained
    return Step(replace(recipe, bias=other.reshape(-1), trained=trained), stage)


def _rows(
    recipe: Recipe, stage: Stage, hidden: torch.Tensor, adjoint: Key, move: Callable[[torch.Tensor], torch.Tensor]
) -> Step:
    return Step(replace(recipe, hidden=hidden), Stage(stage, adjoint, move, stage.rows_only))


STEPS: dict[Any, Stepper] = {
    **dict.fromkeys(RESHAPES, _reshaped),
    aten.slice.Tensor: _sliced,
    aten.select.int: _selected,
    **dict.fromkeys((aten.transpose.int, aten.permute.default), _permuted),
    aten.mul.Tensor: _multiplied,
    aten.div.Tensor: _divided,
    aten.tanh.default: _squashed,
    **dict.fromkeys((aten._to_copy.default, aten.clone.default), _cast),
    aten.add.Tensor: _plus,
}


def split(
    recipe: Recipe, stage: Stage, meta: torch.Tensor, func: Any, results: Sequence[torch.Tensor], args: Sequence[Any]
) -> list[Step] | None:
    """Return the steps to the pieces into which the rows are split."""
    dim = (args[0] if args else 0) if func is aten.unbind.int else (args[1] if len(args) > 1 else 0)
    dim %= meta.dim()
    if dim == meta.dim() - 1:
        return None
    stacked = func is aten.unbind.int
    adjoint = ("stack" if stacked else "cat", dim)
    pieces, way = func(recipe.hidden, *args), f"{len(results)} by {func} of {args}"
    return [
        Step(replace(recipe, hidden=piece), Stage(stage, adjoint, None, stage.rows_only, (i, way)))
        for i, piece in enumerate(pieces)
    ]


def joined(func: Any, stages: Sequence[Stage], args: Sequence[Any]) -> bool:
    """Whether `cat` or `stack` puts gradients for all pieces of one stage together again."""
    first = stages[0]
    name = {aten.cat.default: "cat", aten.stack.default: "stack"}.get(func)
    way = "" if first.piece is None else first.piece[1]
    whole = way.startswith(f"{len(stages)} by ")
    same = all(s.parent is first.parent and s.piece == (i, way) for i, s in enumerate(stages))
    return whole and same and first.adjoint == (name, args[0] if args else 0)


def key_of(func: Any, meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> Key:
    """Return an operation on a gradient as `Stage.adjoint` has it, () for those that are none."""
    if func in RESHAPES:
        return ("reshape", tuple(result.shape))
    if func is aten.slice_backward.default:
        sizes, dim, start, stop, step = args
        dim %= len(sizes)
        return ("slice", tuple(sizes), dim, *_bounds(sizes[dim], start, stop, step))
    if func is aten.select_backward.default:
        sizes, dim, index = args
        return ("select", tuple(sizes), dim % len(sizes), index % sizes[dim])
    if func in (aten.transpose.int, aten.permute.default):
        return ("permute", _order(meta.dim(), args))
    if func is aten._to_copy.default:
        return ("cast", result.dtype)
    if func in (aten.mul.Tensor, aten.div.Tensor) and _is_scale(meta, result, args):
        return ("mul" if func is aten.mul.Tensor else "div", args[0])
    if func is aten.tanh_backward.default and isinstance(after := getattr(args[0], "stage", None), Stage):
        return ("tanh", after.parent)
    return ()


def _is_scale(meta: torch.Tensor, result: torch.Tensor, args: Sequence[Any]) -> bool:
    factor = args[0]
    number = isinstance(factor, (int, float)) and not isinstance(factor, bool) and factor > 0 and math.isfinite(factor)
    return len(args) == 1 and number and result.dtype == meta.dtype


def _order(dims: int, args: Sequence[Any]) -> tuple[int, ...]:
    if isinstance(args[0], (list, tuple)):
        return tuple(dim % dims for dim in args[0])
    order = list(range(dims))
    first, second = args[0] % dims, args[1] % dims
    order[first], order[second] = second, first
    return tuple(order)


def _bounds(size: int, start: int | None, stop: int | None, step: int) -> tuple[int, int, int]:
    begin, end, step = slice(start, stop, step).indices(size)
    return begin, max(begin, end), step
