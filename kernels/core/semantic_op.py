"""What a semantic op is: a named computation with a formula, a hand-derived backward, and implementations.

An op is declared once, in `kernels/formulas`, or by anybody with `fastlora.kernels.register_op`:

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
"""Takes which gradients are wanted and the op's arguments and results by name; says whether to save a tensor."""
Sample = Callable[[dict[str, torch.Tensor]], torch.Tensor]
"""Takes the op's other tensors by name; makes a meaningful value of one for which random numbers are none."""


@dataclass(frozen=True)
class Policy:
    """What may be done with an op's tensors beyond its formula, to save memory or work.

    Attributes:
        grads_in_forward: the forward is told which gradients will be wanted (`wanted`) and may compute them on the
            way; the backward is told (`may_overwrite`) whether it is the last to read them.
        may_overwrite_saved: the backward is told (`may_overwrite`) whether nothing else reads the residuals that the
            forward made, so that it may write its results into their memory.
        recomputable: large residuals that can be left out of what is saved, and are then made again in the backward,
            bit for bit, from the rest of it: by an implementation's `restore`, or else by its forward.
        recompute_from: an op that makes this op's first output again from what this op saves for its own backward, and
            how that op's arguments are called here; (None, {}) for this op itself. Readers of the output need not save
            it.
        reads_quantized: frozen matrices that every implementation reads through `QuantizedWeight` alone, so that the
            dequantized weight is never kept.
        outputs_mutable: outputs have memory of their own, which no implementation reads again: the graph may write to
            them in place.
        samples: how to make a meaningful value, for replays on random values, of an argument for which a random tensor
            would be none.
    """

    grads_in_forward: bool = False
    may_overwrite_saved: bool = False
    recomputable: tuple[str, ...] = ()
    recompute_from: tuple[SemanticOp | None, dict[str, str]] | None = None
    reads_quantized: tuple[str, ...] = ()
    outputs_mutable: bool = False
    samples: dict[str, Sample] = field(default_factory=dict)


class SemanticOp:
    """A named computation with a formula, a hand-derived backward, and implementations.

    Attributes:
        name, family: the op's name, and the family that reports count it under (`norm`, `lora`, ...).
        schema: its arguments and results; no argument has a default, and none is mutated.
        arguments, outputs, residuals: the parsed schema. Residuals come after the outputs and carry no gradient.
        reference: plain PyTorch from the arguments to the outputs, differentiable by autograd, in any dtype.
        implementations: what can run; the PyTorch one is always there.
        saves: what the backward takes, out of arguments, outputs and residuals.
        traceable: whether the PyTorch implementation is; see `Implementation`.
        policy: what may be done with its tensors.
        choices: all the values of a string argument that has only these.
        cost: the least work of a forward and a backward.
        is_constant: whether it has no backward: results carry no gradient, as the model stops it there.
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
        """Return what to call `target` with: `arguments` in the schema's order.

        An optional tensor may be left out.

        Raises:
            TypeError: if an argument is unknown or missing.
        """
        if not (self._required.issubset(arguments) and self._known.issuperset(arguments)):  # as Dynamo can trace it
            unknown, missing = set(arguments) - self._known, self._required - set(arguments)
            raise TypeError(f"{self.name}{self.schema}: unknown {sorted(unknown)}, missing {sorted(missing)}")
        values: list[Any] = [arguments.get(name) for name in self.names]
        if self._lists:
            length = next((len(values[i]) for i in self._lists if values[i]), 0)
            for i in self._lists:
                values[i] = [None] * length if values[i] is None else values[i]
        return [*values, []] if self.policy.grads_in_forward else values

    def as_tuple(self, results: Any) -> tuple[Any, ...]:
        """Return what `target` returns as a tuple, also where it is one tensor."""
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
        """Add an implementation, which runs on GPUs where it serves the arguments at hand; see `Implementation`."""
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
        """Return which gradients are one tensor in a call with these `values`, in the schema's order."""
        return self._shared if self._untied_at is None or values[self._untied_at] is None else self._untied

    def to_save(
        self, needs: Sequence[bool], values: Sequence[Any], results: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """Return what the backward takes: tensors, None where no wanted gradient reads one, and all else."""
        named = self.named(values, results)
        dropped = self.not_saved(needs, named)
        saved = [_nothing(named[a.name]) if a.name in dropped else named[a.name] for a in self.saved]
        return saved, self.constants_of(named)

    def named(self, values: Sequence[Any], results: Sequence[Any]) -> dict[str, Any]:
        """Return arguments and results by name."""
        return dict(zip((*self.names, *self.result_names), (*values[: len(self.names)], *results), strict=True))

    def constants_of(self, named: dict[str, Any]) -> list[Any]:
        """Return what the backward takes besides tensors, of arguments and results by name."""
        return [*(_dtype(named[name]) for name in self.saved_if), *(named[a.name] for a in self.constants)]

    def not_saved(self, needs: Sequence[bool], named: dict[str, Any]) -> set[str]:
        """Return what no wanted gradient reads, of all that `saves` names, given arguments and results by name."""
        wanted = self.wanted(needs)
        return {name for name, hold in self.saved_if.items() if not hold(wanted, named)}

    def recompute_source(self) -> tuple[SemanticOp, list[str]] | None:
        """Return the op that makes this one's first output again, and what its arguments are called here, in order."""
        if self.policy.recompute_from is None:
            return None
        op, others = self.policy.recompute_from
        source = op or self
        return source, [others.get(name, name) for name in source.names]


class DerivedArgument(NamedTuple):
    """An argument of an op that is the first output of another op, and can be made from that op's arguments.

    Attributes:
        argument: its name.
        member: its place in a list of tensors; None if the argument is no list.
        source: the op that makes it.
        quantized: whether this op reads it quantized. Otherwise the forward has it, and only the backward makes it
            again, so that it is not saved.
    """

    argument: str
    member: int | None
    source: SemanticOp
    quantized: bool = False


def _dtype(value: Any) -> torch.dtype | None:
    """Return a tensor's dtype, or that of the tensors of a list."""
    if isinstance(value, list):
        return next((t.dtype for t in value if t is not None), None)
    return None if value is None else value.dtype


def _nothing(value: Any) -> list[None] | None:
    return [None] * len(value) if isinstance(value, list) else None
