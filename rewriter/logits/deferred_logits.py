"""Deferred logits: the output head's product, which is computed only if something other than a loss reads it.

A Hugging Face model returns its logits next to its loss, and some trainers compute the loss outside, so fusing head and
loss inside a graph would save nothing. While gradients are on, the head returns `DeferredLogits`, the output of an
autograd function of hidden states and weights. Casts, views, rows, a bias, a scale or soft-cap keep them deferred; a
cross-entropy of them runs the fused op; for everything else they are a tensor like any other.

The gradient of that cross-entropy for the logits is deferred as well: a `DeferredGradient` carries those for hidden
states and weights, which the op has made, back to the head. Only if something reads it (a hook, `retain_grad`,
`autograd.grad`, a sum with another gradient) is the gradient for the logits computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastlora.compat.autograd import storage_id
from fastlora.logits import deferred_ops
from fastlora.logits.cell import Cell
from fastlora.logits.deferred_ops import Parts, Stage, Step, aten
from fastlora.logits.deferred_tensor import Deferred, is_view, plain
from fastlora.logits.recipe import Recipe, Snapshot

_COPY_OPTIONS = {"dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format"}


@dataclass
class Tally:
    """How often a head deferred, how often its logits met a loss, and which lines read the logits. `dry` computes no
    loss."""

    deferred: int = 0
    fused: int = 0
    materialized: Counter[str] = field(default_factory=Counter)
    dry: bool = False
    backwards: int = 0

    def has_gone_back(self, moment: tuple[int, int] | None) -> bool:
        """Whether a backward has run since, after which weights are likely to change."""
        return moment is None or moment[1] != self.backwards

    def moment(self) -> tuple[int, int]:
        """What changes with each call of the head and each of its backwards: between them nothing trains."""
        return self.deferred, self.backwards


class DeferredLogits(Deferred):
    """Logits that are computed only if something reads them; see this module's docstring."""

    recipe: Recipe
    stage: Stage
    snapshot: Snapshot
    tally: Tally

    @staticmethod
    def of(
        cell: Cell, meta: torch.Tensor, recipe: Recipe, stage: Stage, snapshot: Snapshot, tally: Tally
    ) -> DeferredLogits:
        made = DeferredLogits(cell, meta, recipe.hidden.device)
        made.recipe, made.stage, made.snapshot, made.tally = recipe, stage, snapshot, tally
        return made

    def then(self, cell: Cell, meta: torch.Tensor, step: Step, snapshot: Snapshot | None = None) -> DeferredLogits:
        """Return the logits after one more operation."""
        return DeferredLogits.of(cell, meta, step.recipe, step.stage, snapshot or self.snapshot, self.tally)

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in deferred_ops.SAME:
            return self.then(self.cell, func(self.meta), Step(self.recipe, self.stage))
        if func in deferred_ops.SPLITS:
            return self._split(func, args)
        stepper = deferred_ops.STEPS.get(func)
        if stepper is None or not _only_copies(kwargs, self.device):
            return NotImplemented
        result = _on_meta(func, self.meta, args, kwargs)
        step = stepper(self.recipe, self.stage, self.meta, result, args)
        if step is None:
            return NotImplemented
        if func is aten.add.Tensor:
            return self._plus(args[0], result, step)
        return self.then(self.cell.derive(lambda value: func(value, *args, **kwargs), is_view(func)), result, step)

    def _plus(self, bias: torch.Tensor, meta: torch.Tensor, step: Step) -> DeferredLogits:
        own = Snapshot([bias])

        def compute(value: torch.Tensor) -> torch.Tensor:
            own.check(look=True)
            return value + bias

        return self.then(self.cell.derive(compute), meta, step, self.snapshot.and_of(bias))

    def _split(self, func: Any, args: tuple[Any, ...]) -> Any:
        results = func(self.meta, *args)
        steps = deferred_ops.split(self.recipe, self.stage, self.meta, func, results, args)
        if steps is None:
            return NotImplemented

        def piece(i: int) -> Cell:
            return self.cell.derive(lambda value: func(value, *args)[i], is_view=True)

        return [self.then(piece(i), *pair) for i, pair in enumerate(zip(results, steps, strict=True))]


class DeferredGradient(Deferred):
    """The gradient of a loss for logits, which carries what the op has made of it.

    Attributes:
        parts: the gradients for hidden states and parameters.
        stage: of the logits that this is a gradient for.
    """

    parts: Parts
    stage: Stage
    taken: set[int]

    @staticmethod
    def of(
        cell: Cell, meta: torch.Tensor, parts: Parts, stage: Stage, device: torch.device, taken: set[int] | None = None
    ) -> DeferredGradient:
        made = DeferredGradient(cell, meta, device)
        made.parts, made.stage = parts, stage
        made.taken = set() if taken is None else taken
        return made

    def parts_at(self, stage: Stage) -> Parts | None:
        """Return the parts if this is a gradient for logits of that stage. One whose memory is in other hands may have
        been written to, and then counts as any tensor."""
        return self.parts if stage is self.stage and not self.cell.memory.is_shared else None

    def take_parts(self, stage: Stage) -> Parts | None:
        """Return the parts once only, as the caller may write to them; None from then on."""
        parts = self.parts_at(stage)
        memories = set() if parts is None else {storage_id(part) for part in parts.values()}
        if parts is None or memories & self.taken:
            return None
        self.taken |= memories
        return parts

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in deferred_ops.SAME:
            return self._same(self.cell, func(self.meta))
        if func is aten.add.Tensor:
            return self._plus(*args) if len(args) == 1 and not kwargs else NotImplemented
        if func is aten.sum.dim_IntList:
            return self._sum(*args, **kwargs)
        if func not in _ADJOINTS or not _only_copies(kwargs, self.device):
            return NotImplemented
        if func is aten.tanh_backward.default and getattr(args[0], "stage", None) is not self.stage:
            return NotImplemented
        result = _on_meta(func, self.meta, args, kwargs)
        cell = self.cell.derive(lambda value: func(value, *map(plain, args), **kwargs), is_view(func))
        if func is aten.clone.default:
            return self._same(cell, result)
        if deferred_ops.key_of(func, self.meta, result, args) != self.stage.adjoint or self.stage.parent is None:
            return NotImplemented
        parts, parent = self.stage.back(self.parts), self.stage.parent
        return DeferredGradient.of(cell, result, parts, parent, self.device, self.taken)

    def _same(self, cell: Cell, meta: torch.Tensor) -> DeferredGradient:
        return DeferredGradient.of(cell, meta, self.parts, self.stage, self.device, self.taken)

    def _plus(self, other: Any) -> Any:
        """The sum of two gradients for the same logits, of two losses say."""
        if not isinstance(other, DeferredGradient) or (parts := other.parts_at(self.stage)) is None:
            return NotImplemented
        if (self.dtype, self.shape, self.parts.keys()) != (other.dtype, other.shape, parts.keys()):
            return NotImplemented
        added = {name: part + parts[name] for name, part in self.parts.items()}
        cell = Cell.join([self.cell, other.cell], lambda values: values[0] + values[1])
        return DeferredGradient.of(cell, self.meta, added, self.stage, self.device)

    def _sum(self, dims: Sequence[int], keepdim: bool = False, *, dtype: Any = None) -> Any:
        """The gradient of a bias that was added to the logits: a sum over all rows."""
        summed = sorted(dim % self.dim() for dim in dims)
        bias = self.parts.get("bias")
        if bias is None or not self.stage.rows_only or dtype is not None or summed != list(range(self.dim() - 1)):
            return NotImplemented
        return bias.to(self.dtype, copy=True).reshape((*[1] * (self.dim() - 1), -1) if keepdim else (-1,))

    @classmethod
    def apply_to_list(cls, func: Any, tensors: list[Any], args: tuple[Any, ...]) -> Any:
        """The gradients for all pieces of logits that were split."""
        if not all(isinstance(t, DeferredGradient) and t.parts_at(t.stage) is not None for t in tensors):
            return NotImplemented
        first = tensors[0]
        if not deferred_ops.joined(func, [t.stage for t in tensors], args):
            return NotImplemented
        parts = {
            name: func([t.parts[name] for t in tensors], *args) if name == "x" else sum(t.parts[name] for t in tensors)
            for name in first.parts
        }
        cell = Cell.join([t.cell for t in tensors], lambda values: func(values, *args))
        meta = func([t.meta for t in tensors], *args)
        return DeferredGradient.of(cell, meta, parts, first.stage.parent, first.device)


_ADJOINTS = {
    *deferred_ops.RESHAPES, aten.slice_backward.default, aten.select_backward.default, aten.transpose.int,
    aten.permute.default, aten._to_copy.default, aten.mul.Tensor, aten.div.Tensor, aten.tanh_backward.default,
    aten.clone.default,
}  # fmt: skip


def _only_copies(kwargs: dict[str, Any], device: torch.device) -> bool:
    """Whether the keywords of an operation are those of a copy on the same device."""
    known = kwargs.keys() <= _COPY_OPTIONS and kwargs.get("layout") in (None, torch.strided)
    where = kwargs.get("device")
    return known and not kwargs.get("pin_memory") and (where is None or torch.device(where) == device)


def _on_meta(func: Any, meta: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    rest = (t.meta if isinstance(t, Deferred) else t.to("meta") if isinstance(t, torch.Tensor) else t for t in args)
    result: torch.Tensor = func(meta, *rest, **kwargs)
    return result
