"""Semantic ops: named computations with a reference formula, a hand-derived backward, and implementations.

An op is declared once, in `kernels/formulas` or in user code, with `fastlora.kernels.register_op`:

    rms_norm = register_op(
        "rms_norm", family="norm",
        schema="(Tensor x, Tensor? weight, float eps, ...) -> (Tensor y, Tensor rstd)", outputs=1,
        reference=reference, forward=forward, backward=backward, saves=("x", "weight", "rstd"),
    )

`forward` and `backward` are its PyTorch implementation, which runs anywhere and in any dtype. Others are added with

    rms_norm.implementation("triton", forward=..., backward=..., serves=..., serves_backward=...)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from fastlora.kernels.core.cost import Cost
from fastlora.kernels.core.gradients import Gradients, SharedGradients, Wanted, reachable
from fastlora.kernels.core.implementations import Implementation, Implementations
from fastlora.kernels.core.schema import Argument, Leaves, parse

SavedIf = Callable[[Wanted, dict[str, Any]], bool]
"""Whether to save a tensor, from the wanted gradients and the op's arguments and results by name."""
Sample = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""Returns a valid value of an argument for which random numbers are not, from the op's other tensors by name."""


@dataclass(frozen=True)
class Policy:
    """Optimizations of memory and work that an op supports.

    Attributes:
        grads_in_forward: the forward takes which gradients are wanted (`wanted`) and may compute them; the backward
            takes whether nothing else reads these (`may_overwrite`).
        may_overwrite_saved: the backward takes whether nothing else reads the saved residuals (`may_overwrite`), so
        that
            it may write its results to their memory.
        recomputable: large residuals that need not be saved, since the backward can recompute them bit for bit from
            other saved tensors: by an implementation's `restore`, or else by its forward.
        recompute_from: an op that recomputes this op's first output from what this op saves, and what that op's
            arguments are called here; (None, {}) for this op itself. Readers of the output need not save it.
        reads_quantized: frozen matrices that all implementations accept as a `QuantizedWeight`, so that the dequantized
            weight is never saved.
        outputs_mutable: outputs have their own memory and are not saved, so the graph may write to them in place.
        samples: how to make valid values, for verification on random inputs, of arguments for which a random tensor is
            not.
    """

    grads_in_forward: bool = False
    may_overwrite_saved: bool = False
    recomputable: tuple[str, ...] = ()
    recompute_from: tuple[SemanticOp | None, dict[str, str]] | None = None
    reads_quantized: tuple[str, ...] = ()
    outputs_mutable: bool = False
    samples: dict[str, Sample] = field(default_factory=dict)


class SemanticOp:
    """A named computation with a reference formula, a hand-derived backward, and implementations.

    Attributes:
        name, family: the op's name, and the family that reports count it under (`norm`, `lora`, ...).
        schema: its arguments and results; no argument has a default, and none is mutated.
        arguments, outputs, residuals: the parsed schema. Residuals are returned after the outputs, without gradients.
        reference: computes the outputs in plain PyTorch, differentiable by autograd, in any dtype.
        implementations: the PyTorch implementation and those for GPUs.
        saves: the arguments, outputs and residuals that the backward takes.
        traceable: whether the PyTorch implementation is traceable; see `Implementation`.
        policy: the optimizations that it supports.
        choices: the allowed values of string arguments.
        cost: the minimum work of a forward and a backward.
        is_constant: whether it has no backward; results then have no gradient.
        target, backward_target: the registered operators. `target` returns outputs and residuals.
    """

    target: Any
    backward_target: Any

    def __init__(
        self,
        name: str,
        *,
        family: str,
        schema: str,
        outputs: int,
        reference: Callable[..., Any],
        forward: Callable[..., tuple[Any, ...]],
        backward: Callable[..., Gradients] | None = None,
        saves: tuple[str, ...],
        saved_if: dict[str, SavedIf] | None = None,
        tied: tuple[str, ...] = (),
        untied_by: str | None = None,
        passthrough: tuple[str, ...] = (),
        read_by: dict[str, int] | None = None,
        traceable: bool = False,
        policy: Policy | None = None,
        choices: dict[str, tuple[str, ...]] | None = None,
        cost: Cost | None = None,
    ) -> None:
        self.name, self.family, self.schema, self.reference = name, family, schema, reference
        self.is_constant = backward is None
        self.policy, self.choices, self.cost = policy or Policy(), choices or {}, cost
        self.implementations = Implementations(name, Implementation("pytorch", forward, backward, traceable=traceable))
        self.arguments, results = parse(schema)
        self.outputs, self.residuals = results[:outputs], results[outputs:]
        self.names, self.result_names = tuple(a.name for a in self.arguments), tuple(r.name for r in results)
        tensors = tuple(a for a in self.arguments if a.is_tensor)
        self.constants = tuple(a for a in self.arguments if not a.is_tensor)
        named = {a.name: a for a in (*tensors, *results)}
        self.saved: tuple[Argument, ...] = tuple(named[s] for s in saves)
        self.leaves, self.saved_leaves = Leaves(self.arguments), Leaves(self.saved)
        self.output_leaves, self.residual_leaves = Leaves(self.outputs), Leaves(self.residuals)
        self.result_leaves = Leaves(results)
        self.saved_if = saved_if or {}
        self.backward_names = (
            *(a.name for a in self.saved),
            *(f"{name}_dtype" for name in self.saved_if),
            *(a.name for a in self.constants),
        )
        names = tuple(a.name for a in tensors)
        self._shared = SharedGradients(names, tied, passthrough)
        self._untied = SharedGradients(names, (), passthrough)
        self._untied_at = None if untied_by is None else self.names.index(untied_by)
        self._read_by = read_by or {}
        self._known = set(self.names)
        self._required = {a.name for a in self.arguments if not a.is_optional}
        self._lists = [i for i, a in enumerate(self.arguments) if a.is_list]

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __call__(self, **arguments: Any) -> Any:
        """Run the op on keyword arguments; return its output, or a tuple of them, without the residuals."""
        results = self.as_tuple(self.target(*self.order(arguments)))
        return results[0] if len(self.outputs) == 1 else results[: len(self.outputs)]

    def order(self, arguments: dict[str, Any]) -> list[Any]:
        """Return `arguments` in the schema's order, for a call of `target`. Optional tensors may be omitted.

        Raises:
            TypeError: if an argument is unknown or missing.
        """
        if not (self._required.issubset(arguments) and self._known.issuperset(arguments)):  # traceable by Dynamo
            unknown, missing = set(arguments) - self._known, self._required - set(arguments)
            raise TypeError(f"{self.name}{self.schema}: unknown {sorted(unknown)}, missing {sorted(missing)}")
        values: list[Any] = [arguments.get(name) for name in self.names]
        if self._lists:
            length = next((len(values[i]) for i in self._lists if values[i]), 0)
            for i in self._lists:
                values[i] = [None] * length if values[i] is None else values[i]
        return [*values, []] if self.policy.grads_in_forward else values

    def as_tuple(self, results: Any) -> tuple[Any, ...]:
        """Return the results of `target` as a tuple, also if it is a single tensor."""
        return results if len(self.result_names) > 1 else (results,)

    def implementation(
        self,
        name: str,
        *,
        forward: Callable[..., tuple[Any, ...]],
        backward: Callable[..., Gradients] | None = None,
        serves: Callable[..., bool],
        serves_backward: Callable[..., bool] | None = None,
        restore: Callable[..., tuple[torch.Tensor, ...]] | None = None,
        traceable: bool = False,
    ) -> None:
        """Add an implementation, which runs on GPUs for the arguments that it supports; see `Implementation`."""
        self.implementations.accelerated.append(
            Implementation(name, forward, backward, serves, serves_backward, restore, traceable)
        )

    # -- what the backward needs ---------------------------------------------------------------------------------------

    def wanted(self, needs: Sequence[bool]) -> Wanted:
        """Return the flat `needs` of the tensor leaves by argument."""
        return self.leaves.named(needs)

    def reachable(self, needs: Sequence[bool], grads: Sequence[torch.Tensor | None]) -> list[bool]:
        """Return `needs` without the leaves that only outputs without an incoming gradient depend on."""
        return reachable(needs, grads, self.leaves, self.output_leaves, self._read_by)

    def shared_gradients(self, values: Sequence[Any]) -> SharedGradients:
        """Return which gradients are shared in a call with these `values`, in the schema's order."""
        return self._shared if self._untied_at is None or values[self._untied_at] is None else self._untied

    def to_save(
        self, needs: Sequence[bool], values: Sequence[Any], results: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Return the tensors to save, None for those that no needed gradient reads, and the backward's constants."""
        named = self.named(values, results)
        dropped = self.not_saved(needs, named)
        saved = [_none_like(named[a.name]) if a.name in dropped else named[a.name] for a in self.saved]
        return saved, self.constants_of(named)

    def named(self, values: Sequence[Any], results: Sequence[Any]) -> dict[str, Any]:
        """Return arguments and results by name."""
        return dict(zip((*self.names, *self.result_names), (*values[: len(self.names)], *results), strict=True))

    def constants_of(self, named: dict[str, Any]) -> list[Any]:
        """Return the backward's arguments besides tensors, from arguments and results by name."""
        return [*(_dtype(named[name]) for name in self.saved_if), *(named[a.name] for a in self.constants)]

    def not_saved(self, needs: Sequence[bool], named: dict[str, Any]) -> set[str]:
        """Return the names in `saves` that no needed gradient reads, from arguments and results by name."""
        wanted = self.wanted(needs)
        return {name for name, is_saved in self.saved_if.items() if not is_saved(wanted, named)}

    def recompute_source(self) -> tuple[SemanticOp, list[str]] | None:
        """Return the op that recomputes this one's first output, and the names of its arguments here, in order."""
        if self.policy.recompute_from is None:
            return None
        op, names = self.policy.recompute_from
        source = op or self
        return source, [names.get(name, name) for name in source.names]


class DerivedArgument(NamedTuple):
    """An argument of an op that is the first output of another op, and can be recomputed from that op's arguments.

    Attributes:
        argument: its name.
        member: its index if the argument is a list of tensors, otherwise None.
        source: the op that computes it.
        quantized: whether this op reads it as a `QuantizedWeight`. Otherwise the forward takes the tensor, and only the
            backward recomputes it, so that it is not saved.
    """

    argument: str
    member: int | None
    source: SemanticOp
    quantized: bool = False


def _dtype(value: Any) -> torch.dtype | None:
    """Return the dtype of a tensor, or of the tensors in a list."""
    if isinstance(value, list):
        return next((t.dtype for t in value if t is not None), None)
    return None if value is None else value.dtype


def _none_like(value: Any) -> list[None] | None:
    return [None] * len(value) if isinstance(value, list) else None
