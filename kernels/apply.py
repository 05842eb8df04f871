"""The autograd function that connects the forward of any op with its backward, and keeps what that one takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastlora.kernels import sparing

if TYPE_CHECKING:
    from fastlora.kernels.op import SemanticOp


class Remade(NamedTuple):
    """A saved value, by its place among these, that the backward makes with another op from that op's values."""

    at: int
    maker: SemanticOp
    values: tuple[Any, ...]

    def make(self, leaves: Iterator[torch.Tensor | None]) -> torch.Tensor:
        """The value; `leaves` has the maker's tensors, as they were saved."""
        flat = iter(self.maker.leaves.grouped(list(leaves)))
        values = [next(flat) if a.is_tensor else v for a, v in zip(self.maker.arguments, self.values, strict=True)]
        return self.maker.below_autograd(self.maker.leaves.flat(values), values)[0]

    @property
    def leaves(self) -> list[torch.Tensor | None]:
        return self.maker.leaves.flat(self.values)

    def without_tensors(self) -> Remade:
        arguments = zip(self.maker.arguments, self.values, strict=True)
        return self._replace(values=tuple(None if a.is_tensor else value for a, value in arguments))


class Apply(torch.autograd.Function):
    """Connects an op's forward and backward operators; the leaves of its tensor arguments come flat."""

    @staticmethod
    def forward(
        ctx: Any,
        op: SemanticOp,
        values: tuple[Any, ...],
        owns: bool,
        remade: Remade | None,
        *tensors: torch.Tensor | None,
    ) -> Any:
        needs = ctx.needs_input_grad[4:]
        results = op.below_autograd(tensors, [*values[: len(op.names)], needs] if op.foresees else values)
        results = results if len(op.result_names) > 1 else (results,)
        saved, constants = op.to_save(needs, values, results)
        ctx.op, ctx.constants, ctx.shared, ctx.owns, ctx.remade = op, constants, op.sharing(values), owns, None
        others: list[torch.Tensor | None] = []
        ctx.spared = owns and sparing.spare(op, saved)
        if remade is not None and saved[remade.at] is not None:
            saved[remade.at], others, ctx.remade = None, remade.leaves, remade.without_tensors()
        ctx.lengths = [len(value) if isinstance(value, list) else None for value in saved]
        ctx.save_for_backward(*op.saved_leaves.flat(saved), *others)
        outputs = op.output_leaves.flat(results)
        ctx.outputs = len(outputs)
        ctx.set_materialize_grads(False)
        if owns:
            return tuple(outputs)
        residuals = op.residual_leaves.flat(results[len(op.outputs) :])
        ctx.mark_non_differentiable(*residuals)
        return (*outputs, *residuals)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if torch.is_grad_enabled():  # once_differentiable would say nothing where only saved tensors carry it
            raise RuntimeError(
                f"{ctx.op.name} has no second derivative: its backward cannot run under create_graph=True"
            )
        op: SemanticOp = ctx.op
        grads = grads[: ctx.outputs]
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        needs = op.reached(ctx.needs_input_grad[4:], grads)
        asked = ctx.shared.ask(needs)
        leaves = ctx.saved_tensors
        flat = iter(leaves)
        saved = [next(flat) if n is None else [next(flat) for _ in range(n)] for n in ctx.lengths]
        found: list[torch.Tensor] = []
        if any(asked):
            if ctx.remade is not None:
                saved[ctx.remade.at] = ctx.remade.make(flat)
            if ctx.spared:
                sparing.restore(op, saved, ctx.constants)
            found = op.differentiate(list(grads), asked, leaves, *saved, *ctx.constants, owned=ctx.owns)
        computed = iter(found)
        results = [next(computed) if ask else None for ask in asked]
        return (None, None, None, None, *ctx.shared.spread(results, needs, grads[0]))
