"""Deferred logits: the output of the head, which is computed only if something other than a loss reads it.

A Hugging Face model returns its logits next to its loss, and some trainers compute the loss outside, so fusing head and
loss inside a graph would save nothing. While gradients are enabled, the head returns `DeferredLogits`, the output of an
autograd function of hidden states and weights. Casts, views, indexed rows, a bias, a scale or soft-cap keep them
deferred; a cross-entropy of them runs the fused op; for everything else they are a tensor like any other.

The gradient of that cross-entropy with respect to the logits is deferred as well: a `DeferredGradient` carries the
gradients for hidden states and weights, which the op has computed, back to the head. The gradient for the logits is
computed only if something reads it (a hook, `retain_grad`, `autograd.grad`, a sum with another gradient).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from fastlora.compat.autograd import storage_id
from fastlora.logits import deferred_ops
from fastlora.logits.deferred_ops import DeferredOutput, Grads, OpNode, aten
from fastlora.logits.deferred_tensor import Deferred, is_view, plain
from fastlora.logits.lazy_value import LazyValue
from fastlora.logits.logits_expr import LogitsExpr, Snapshot

_COPY_OPTIONS = {"dtype", "layout", "device", "pin_memory", "non_blocking", "memory_format"}


@dataclass
class DeferralStats:
    """Counts what happened to the logits of one head.

    Attributes:
        deferred: how often logits were deferred.
        fused: how often a loss of them ran fused.
        materialized: how often logits were computed, by the line that read them.
        dry: whether losses return zeros without computing anything, as for `fastlora.explain`.
        backwards: how often the backward of the head ran.
    """

    deferred: int = 0
    fused: int = 0
    materialized: Counter[str] = field(default_factory=Counter)
    dry: bool = False
    backwards: int = 0

    def call_counts(self) -> tuple[int, int]:
        """Return the numbers of forwards and backwards. While they are the same, no optimizer step is expected."""
        return self.deferred, self.backwards

    def ran_backward_since(self, counts: tuple[int, int] | None) -> bool:
        """Return whether a backward has run since `call_counts` returned `counts`: weights may have changed then."""
        return counts is None or counts[1] != self.backwards


class DeferredLogits(Deferred):
    """Logits that are computed only if something reads them; see this module's docstring.

    Attributes:
        expr: the expression that computes them.
        node: the operation that they come from.
        snapshot: detects in-place writes to the tensors of `expr`.
        stats: counts what happens to them.
    """

    expr: LogitsExpr
    node: OpNode
    snapshot: Snapshot
    stats: DeferralStats

    @staticmethod
    def of(
        lazy: LazyValue, meta: torch.Tensor, expr: LogitsExpr, node: OpNode, snapshot: Snapshot, stats: DeferralStats
    ) -> DeferredLogits:
        made = DeferredLogits(lazy, meta, expr.hidden.device)
        made.expr, made.node, made.snapshot, made.stats = expr, node, snapshot, stats
        return made

    def then(
        self, lazy: LazyValue, meta: torch.Tensor, output: DeferredOutput, snapshot: Snapshot | None = None
    ) -> DeferredLogits:
        """Return the logits after one more operation."""
        return DeferredLogits.of(lazy, meta, output.expr, output.node, snapshot or self.snapshot, self.stats)

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in deferred_ops.ALIASES:
            return self.then(self.lazy, func(self.meta), DeferredOutput(self.expr, self.node))
        if func in deferred_ops.SPLITS:
            return self._split(func, args)
        handler = deferred_ops.HANDLERS.get(func)
        if handler is None or not _only_copies(kwargs, self.device):
            return NotImplemented
        result = _on_meta(func, self.meta, args, kwargs)
        output = handler(self.expr, self.node, self.meta, result, args)
        if output is None:
            return NotImplemented
        if func is aten.add.Tensor:
            return self._add_bias(args[0], result, output)
        return self.then(self.lazy.derive(lambda value: func(value, *args, **kwargs), is_view(func)), result, output)

    def _add_bias(self, bias: torch.Tensor, meta: torch.Tensor, output: DeferredOutput) -> DeferredLogits:
        bias_snapshot = Snapshot([bias])

        def compute(value: torch.Tensor) -> torch.Tensor:
            bias_snapshot.check(check_values=True)
            return value + bias

        return self.then(self.lazy.derive(compute), meta, output, self.snapshot.with_tensor(bias))

    def _split(self, func: Any, args: tuple[Any, ...]) -> Any:
        results = func(self.meta, *args)
        outputs = deferred_ops.split(self.expr, self.node, self.meta, func, results, args)
        if outputs is None:
            return NotImplemented

        def piece(i: int) -> LazyValue:
            return self.lazy.derive(lambda value: func(value, *args)[i], is_view=True)

        return [self.then(piece(i), *pair) for i, pair in enumerate(zip(results, outputs, strict=True))]


class DeferredGradient(Deferred):
    """The gradient of a loss for logits, which carries the gradients that the fused op has computed.

    Attributes:
        grads: the gradients for hidden states and parameters.
        node: that of the logits that this is a gradient for.
        taken_storages: the storages of gradients that `take_grads` has returned.
    """

    grads: Grads
    node: OpNode
    taken_storages: set[int]

    @staticmethod
    def of(
        lazy: LazyValue,
        meta: torch.Tensor,
        grads: Grads,
        node: OpNode,
        device: torch.device,
        taken_storages: set[int] | None = None,
    ) -> DeferredGradient:
        made = DeferredGradient(lazy, meta, device)
        made.grads, made.node = grads, node
        made.taken_storages = set() if taken_storages is None else taken_storages
        return made

    def grads_for(self, node: OpNode) -> Grads | None:
        """Return the gradients if this is a gradient for the logits of `node`, else None. If its storage is shared, it
        may have been written to, and is treated as an ordinary tensor."""
        return self.grads if node is self.node and not self.lazy.storage.is_shared else None

    def take_grads(self, node: OpNode) -> Grads | None:
        """Return `grads_for(node)` for the first call, whose caller may write to them; None from then on."""
        grads = self.grads_for(node)
        storages = set() if grads is None else {storage_id(grad) for grad in grads.values()}
        if grads is None or storages & self.taken_storages:
            return None
        self.taken_storages |= storages
        return grads

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in deferred_ops.ALIASES:
            return self._alias(self.lazy, func(self.meta))
        if func is aten.add.Tensor:
            return self._add(*args) if len(args) == 1 and not kwargs else NotImplemented
        if func is aten.sum.dim_IntList:
            return self._sum(*args, **kwargs)
        if func not in _ADJOINTS or not _only_copies(kwargs, self.device):
            return NotImplemented
        if func is aten.tanh_backward.default and getattr(args[0], "node", None) is not self.node:
            return NotImplemented
        result = _on_meta(func, self.meta, args, kwargs)
        lazy = self.lazy.derive(lambda value: func(value, *map(plain, args), **kwargs), is_view(func))
        if func is aten.clone.default:
            return self._alias(lazy, result)
        key, parent = deferred_ops.adjoint_key(func, self.meta, result, args), self.node.parent
        if key != self.node.adjoint or parent is None:
            return NotImplemented
        grads = self.node.grads_for_parent(self.grads)
        return DeferredGradient.of(lazy, result, grads, parent, self.device, self.taken_storages)

    def _alias(self, lazy: LazyValue, meta: torch.Tensor) -> DeferredGradient:
        return DeferredGradient.of(lazy, meta, self.grads, self.node, self.device, self.taken_storages)

    def _add(self, other: Any) -> Any:
        """Add two gradients for the same logits, for example of two losses."""
        if not isinstance(other, DeferredGradient) or (grads := other.grads_for(self.node)) is None:
            return NotImplemented
        if (self.dtype, self.shape, self.grads.keys()) != (other.dtype, other.shape, grads.keys()):
            return NotImplemented
        added = {name: grad + grads[name] for name, grad in self.grads.items()}
        lazy = LazyValue.join([self.lazy, other.lazy], lambda values: values[0] + values[1])
        return DeferredGradient.of(lazy, self.meta, added, self.node, self.device)

    def _sum(self, dims: Sequence[int], keepdim: bool = False, *, dtype: Any = None) -> Any:
        """Sum over all rows: the gradient of a bias that was added to the logits."""
        summed = sorted(dim % self.dim() for dim in dims)
        bias = self.grads.get("bias")
        if bias is None or not self.node.only_rows_changed or dtype is not None:
            return NotImplemented
        if summed != list(range(self.dim() - 1)):
            return NotImplemented
        return bias.to(self.dtype, copy=True).reshape((*[1] * (self.dim() - 1), -1) if keepdim else (-1,))

    @classmethod
    def apply_to_list(cls, func: Any, tensors: list[Any], args: tuple[Any, ...]) -> Any:
        """Join the gradients for all pieces of logits that were split."""
        if not all(isinstance(t, DeferredGradient) and t.grads_for(t.node) is not None for t in tensors):
            return NotImplemented
        first = tensors[0]
        if not deferred_ops.undoes_split(func, [t.node for t in tensors], args):
            return NotImplemented
        grads = {
            name: func([t.grads[name] for t in tensors], *args) if name == "x" else sum(t.grads[name] for t in tensors)
            for name in first.grads
        }
        lazy = LazyValue.join([t.lazy for t in tensors], lambda values: func(values, *args))
        meta = func([t.meta for t in tensors], *args)
        return DeferredGradient.of(lazy, meta, grads, first.node.parent, first.device)


_ADJOINTS = {
    *deferred_ops.RESHAPES, aten.slice_backward.default, aten.select_backward.default, aten.transpose.int,
    aten.permute.default, aten._to_copy.default, aten.mul.Tensor, aten.div.Tensor, aten.tanh_backward.default,
    aten.clone.default,
}  # fmt: skip


def _only_copies(kwargs: dict[str, Any], device: torch.device) -> bool:
    """Return whether the keyword arguments of an operator are those of a copy on the same device."""
    known = kwargs.keys() <= _COPY_OPTIONS and kwargs.get("layout") in (None, torch.strided)
    where = kwargs.get("device")
    return known and not kwargs.get("pin_memory") and (where is None or torch.device(where) == device)


def _on_meta(func: Any, meta: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    kwargs = {name: value for name, value in kwargs.items() if name != "device"}
    rest = (t.meta if isinstance(t, Deferred) else t.to("meta") if isinstance(t, torch.Tensor) else t for t in args)
    result: torch.Tensor = func(meta, *rest, **kwargs)
    return result
