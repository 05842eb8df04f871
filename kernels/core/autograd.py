"""The autograd function that connects the forward of any op with its backward, and keeps what that one takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fastlora.kernels.core import recompute
from fastlora.kernels.core.quantized_weight import Encoded

if TYPE_CHECKING:
    from fastlora.kernels.core.semantic_op import SemanticOp


class Made(NamedTuple):
    """A tensor argument that is made of another op's values: for the backward alone, which is then not kept, or, if it
    is `encoded`, by the op itself wherever it reads it.

    Attributes:
        argument: its place among the op's arguments; `member` its place in a list of them.
        saved: its place among what the op saves.
        maker, values: the op whose first output it is, and that op's arguments.
    """

    argument: int
    member: int | None
    saved: int
    encoded: bool
    maker: SemanticOp
    values: tuple[Any, ...]

    def make(self, leaves: Iterator[torch.Tensor | None]) -> Any:
        """It, or what stands in for it; `leaves` goes on with the maker's tensors, as they were saved."""
        values = self.maker.leaves.filled(self.values, leaves)
        if self.encoded:
            return Encoded(self.maker, values)
        results = self.maker.below_autograd(self.maker.leaves.flat(values), values)
        return results[0] if len(self.maker.result_names) > 1 else results

    @property
    def leaves(self) -> list[torch.Tensor | None]:
        return self.maker.leaves.flat(self.values)

    def without_tensors(self) -> Made:
        return self._replace(values=self.maker.leaves.emptied(self.values))

    def put(self, values: list[Any], at: int, value: Any) -> None:
        """Puts `value` in its place, the entry `at` of `values` or one of the list there."""
        if self.member is None:
            values[at] = value
        else:
            values[at] = [*values[at][: self.member], value, *values[at][self.member + 1 :]]


def with_encoded(values: Sequence[Any], made: Sequence[Made]) -> Sequence[Any]:
    """An op's values, with what stands in for encoded matrices, of which autograd is not to know, in their places."""
    whole: list[Any] | None = None
    for each in made:
        if each.encoded:
            whole = list(values) if whole is None else whole
            each.put(whole, each.argument, Encoded(each.maker, each.values))
    return values if whole is None else whole


class Backward(NamedTuple):
    """The backward of one call of an op, for an autograd function that is not `Apply`."""

    op: SemanticOp
    needs: Sequence[bool]
    constants: list[Any]
    shared: Any
    lengths: list[int | None]

    def __call__(
        self, saved: Sequence[torch.Tensor | None], grads: list[torch.Tensor | None]
    ) -> list[torch.Tensor | None]:
        """Return a gradient for each tensor leaf, None where none is wanted; `saved` is what `run_apart` returned."""
        op = self.op
        needs = op.reached(self.needs, grads)
        asked = self.shared.ask(needs)
        found: list[torch.Tensor] = []
        if any(asked):
            flat = iter(saved)
            values = [next(flat) if n is None else [next(flat) for _ in range(n)] for n in self.lengths]
            found = op.differentiate(grads, asked, saved, *values, *self.constants, owned=False)
        computed = iter(found)
        results = [next(computed) if ask else None for ask in asked]
        spread: list[torch.Tensor | None] = self.shared.spread(results, needs, grads[0])
        return spread


def run_apart(
    op: SemanticOp, values: Sequence[Any], needs: Sequence[bool]
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None], Backward]:
    """Run an op without autograd: return its outputs, the tensors that its backward takes, and that backward.

    Args:
        op: the op.
        values: its arguments in the schema's order.
        needs: which gradients the backward will be asked for, by tensor leaf.
    """
    own = values[: len(op.names)]
    results = op.below_autograd(op.leaves.flat(own), [*own, list(needs)] if op.foresees else own)
    results = results if len(op.result_names) > 1 else (results,)
    saved, constants = op.to_save(needs, own, results)
    lengths = [len(value) if isinstance(value, list) else None for value in saved]
    backward = Backward(op, needs, constants, op.sharing(own), lengths)
    return op.output_leaves.flat(results), op.saved_leaves.flat(saved), backward


def refuse_second_derivative(name: str) -> None:
    """Raise in a backward under `create_graph`, which `once_differentiable` would not do where only saved tensors carry
    a gradient."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: its backward cannot run under create_graph=True")


class Apply(torch.autograd.Function):
    """Connects an op's forward and backward operators; the leaves of its tensor arguments come flat."""

    @staticmethod
    def forward(
        ctx: Any,
        op: SemanticOp,
        values: tuple[Any, ...],
        owns: bool,
        made: tuple[Made, ...],
        *tensors: torch.Tensor | None,
    ) -> Any:
        needs = ctx.needs_input_grad[4:]
        whole = with_encoded(values, made)
        results = op.below_autograd(tensors, [*whole[: len(op.names)], needs] if op.foresees else whole)
        results = results if len(op.result_names) > 1 else (results,)
        saved, constants = op.to_save(needs, values, results)
        ctx.op, ctx.constants, ctx.shared, ctx.owns = op, constants, op.sharing(values), owns
        ctx.spared = owns and recompute.spare(op, saved)
        made = tuple(each for each in made if each.encoded or saved[each.saved] is not None)
        for each in made:
            each.put(saved, each.saved, None)
        others = [leaf for each in made for leaf in each.leaves]
        ctx.made = tuple(each.without_tensors() for each in made)
        ctx.lengths = [len(value) if isinstance(value, list) else None for value in saved]
        ctx.others = len(others)
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
        refuse_second_derivative(ctx.op.name)
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
            for each in ctx.made:
                each.put(saved, each.saved, each.make(flat))
            if ctx.spared:
                recompute.restore(op, saved, ctx.constants)
            own = leaves[: len(leaves) - ctx.others]
            found = op.differentiate(list(grads), asked, own, *saved, *ctx.constants, owned=ctx.owns)
        computed = iter(found)
        results = [next(computed) if ask else None for ask in asked]
        return (None, None, None, None, *ctx.shared.spread(results, needs, grads[0]))
