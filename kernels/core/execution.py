"""Runs an op's forward or backward with an implementation that supports the arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from fastlora.compat import calls
from fastlora.compat import dispatch as compat_dispatch
from fastlora.kernels.core import dispatch, trace
from fastlora.kernels.core.gradients import SharedGradients
from fastlora.kernels.core.semantic_op import SemanticOp


def run_forward(op: SemanticOp, *values: Any, fake: bool = False) -> Any:
    """Run the forward; return outputs and residuals, as one tensor or as a tuple.

    Args:
        op: the op.
        values: its arguments in the schema's order; for an op that computes gradients in its forward, followed by which
            ones, as a flat list.
        fake: always run the PyTorch implementation.
    """
    named = dict(zip(op.names, values, strict=False))
    tensors = op.leaves.flat(values)
    if op.policy.grads_in_forward:
        named["wanted"] = op.wanted(values[-1] or [False] * len(tensors))
    anchor = next(t for t in tensors if t is not None)
    implementation = op.implementations.pytorch if fake else op.implementations.forward(anchor, named)
    trace.require_traceable(implementation.traceable)
    results = dispatch.profiled(op.name, dispatch.isolated, anchor.device, implementation.forward, **named)
    return results if len(results) > 1 else results[0]


def run_backward(
    op: SemanticOp,
    grads: Sequence[torch.Tensor | None],
    needs: Sequence[bool],
    *values: Any,
    fake: bool = False,
    may_overwrite: bool = False,
) -> list[torch.Tensor]:
    """Run the backward; return the needed gradients, a flat list.

    Args:
        op: the op.
        grads: the incoming gradients, a flat list; not all None.
        needs: which gradients to compute, by tensor leaf.
        values: the arguments named by `op.backward_names`: what was saved, then dtypes and constants.
        fake: always run the PyTorch implementation.
        may_overwrite: whether nothing else reads the residuals, including gradients that the forward computed.
    """
    wanted = op.wanted(needs)
    named = dict(zip(op.backward_names, values, strict=True))
    named["wanted"], named["grads"] = wanted, op.output_leaves.grouped(grads)
    if op.policy.grads_in_forward or op.policy.may_overwrite_saved:
        named["may_overwrite"] = may_overwrite
    anchor = next(g for g in grads if g is not None)
    implementation = op.implementations.pytorch if fake else op.implementations.backward(anchor, named)
    assert implementation.backward is not None
    trace.require_traceable(implementation.traceable)
    run = implementation.backward
    gradients = dispatch.profiled(f"{op.name}_backward", dispatch.isolated, anchor.device, run, **named)
    flat = op.leaves.flat_gradients(gradients, wanted)
    return [g for g, need in zip(flat, needs, strict=True) if need]


def compute(op: SemanticOp, values: Sequence[Any]) -> Any:
    """Run the forward without autograd, through the dispatcher only if necessary."""
    if dispatch.can_bypass_dispatcher(op.leaves.flat(values)):
        with compat_dispatch.disable_function_overrides():  # attribute access of 4-bit parameters takes microseconds
            return run_forward(op, *values)
    with calls.below_autograd():
        return op.target(*values)


Differentiate = Callable[
    [SemanticOp, list["torch.Tensor | None"], list[bool], Sequence["torch.Tensor | None"], list[Any]],
    Sequence[torch.Tensor],
]
"""Runs a backward: takes the op, incoming gradients, which to compute, what was saved, and the backward's values."""


def differentiate(
    op: SemanticOp,
    grads: list[torch.Tensor | None],
    to_compute: list[bool],
    saved: Sequence[torch.Tensor | None],
    values: list[Any],
) -> Sequence[torch.Tensor]:
    """Run the backward on its `values`, whose tensors are `saved`, through the dispatcher only if necessary."""
    if dispatch.can_bypass_dispatcher((*grads, *saved)):
        may_overwrite = op.policy.grads_in_forward and dispatch.is_last_backward()
        with compat_dispatch.disable_function_overrides():
            return run_backward(op, grads, to_compute, *values, may_overwrite=may_overwrite)
    return differentiate_by_operator(op, grads, to_compute, saved, values)


def differentiate_by_operator(
    op: SemanticOp,
    grads: list[torch.Tensor | None],
    to_compute: list[bool],
    saved: Sequence[torch.Tensor | None],
    values: list[Any],
) -> Sequence[torch.Tensor]:
    """Run the backward through the dispatcher."""
    found: list[torch.Tensor] = op.backward_target(grads, to_compute, *values)
    return found


class Backward(NamedTuple):
    """The backward of one call of an op: which gradients are needed, and its arguments besides saved tensors."""

    op: SemanticOp
    needs: Sequence[bool]
    constants: list[Any]
    shared: SharedGradients

    def __call__(
        self,
        saved: Sequence[torch.Tensor | None],
        grads: list[torch.Tensor | None],
        run: Differentiate = differentiate,
    ) -> list[torch.Tensor | None]:
        """Return a gradient for each tensor leaf, None where none is needed; `saved` are `after_forward`'s tensors."""
        op = self.op
        needs = op.reachable(self.needs, grads)
        to_compute = self.shared.to_compute(needs)
        computed: Sequence[torch.Tensor] = ()
        if any(to_compute):
            computed = run(op, grads, to_compute, saved, [*op.saved_leaves.grouped(saved), *self.constants])
        return self.shared.distribute(computed, to_compute, needs, grads[0])


def after_forward(
    op: SemanticOp, needs: Sequence[bool], values: Sequence[Any], results: Sequence[Any]
) -> tuple[list[torch.Tensor | None], Backward]:
    """Return the tensors to save after a forward, as a flat list, and the backward that takes them."""
    saved, constants = op.to_save(needs, values, results)
    return op.saved_leaves.flat(saved), Backward(op, needs, constants, op.shared_gradients(values))


def run_without_autograd(
    op: SemanticOp, values: Sequence[Any], needs: Sequence[bool]
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None], Backward]:
    """Run an op without autograd; return its outputs, the tensors to save, and the backward that takes these.

    Args:
        op: the op.
        values: its arguments in the schema's order.
        needs: which gradients the backward will compute, by tensor leaf.
    """
    own = values[: len(op.names)]
    results = op.as_tuple(compute(op, [*own, list(needs)] if op.policy.grads_in_forward else own))
    return op.output_leaves.flat(results), *after_forward(op, needs, own, results)


def refuse_second_derivative(name: str) -> None:
    """Raise in a backward under `create_graph`.

    `once_differentiable` does not, if only saved tensors require a gradient.

    Raises:
        RuntimeError: if grad mode is enabled.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} has no second derivative: its backward cannot run under create_graph=True")


class Call(NamedTuple):
    """An op, its arguments in the schema's order with meta tensors, and which gradients to compute, by tensor leaf."""

    op: SemanticOp
    values: Sequence[Any]
    needs: Sequence[bool]


def run_on_meta(call: Call) -> None:
    """Run the forward and the backward of a call on meta tensors, so that kernel launches can be recorded."""
    op, values, needs = call
    results = op.as_tuple(run_forward(op, *values[: len(op.names)], *([needs] if op.policy.grads_in_forward else [])))
    grads = [None if t is None else torch.empty_like(t) for t in op.output_leaves.flat(results)]
    to_compute = op.shared_gradients(values).to_compute(op.reachable(needs, grads))
    if any(to_compute) and not op.is_constant:
        saved, constants = op.to_save(needs, values, results)
        run_backward(op, grads, to_compute, *saved, *constants, may_overwrite=True)  # the usual case
