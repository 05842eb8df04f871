"""What a semantic op is, and how one is registered.

A semantic op is declared once: its schema, a reference that autograd differentiates (the meaning), a forward that
also returns the residuals which the backward wants, and a backward derived by hand.

    rms_norm = op(
        "rms_norm", family="norm",
        schema="(Tensor x, Tensor? weight, float eps, ...) -> (Tensor y, Tensor rstd)", outputs=1,
        reference=reference, forward=forward, backward=backward, saves=("x", "weight", "rstd"),
    )

`op` registers two opaque, functional `torch.library` operators, the forward and `<name>_backward`, and connects them by
an autograd function of its own on the Autograd key. That is the one form which runs eagerly, under AOTAutograd and
under Inductor alike, because nothing traces through it; and what the backward takes is exactly what is saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastlora.kernels.core import dispatch
from fastlora.kernels.core.autograd import Apply, Made, with_encoded
from fastlora.kernels.core.cost import Cost
from fastlora.kernels.core.implementations import Form, Forms
from fastlora.kernels.core.quantized_weight import decoded
from fastlora.kernels.core.schema import Leaves, parse

Gradients = dict[str, Any]
Wanted = dict[str, Any]
"""Which gradients are wanted, by argument: a bool, or a list of them for a list of tensors."""
SavedIf = Callable[[Wanted, dict[str, Any]], bool]
Sample = Callable[[dict[str, torch.Tensor]], torch.Tensor]


def _digest(folder: Path) -> str:
    """A digest of a folder's sources: AOTAutograd's cache keys on operator names, and would serve a stale backward."""
    sources = sorted(folder.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:10]


NAMESPACE = f"fastlora_{_digest(Path(__file__).parents[1])}"
_library = torch.library.Library(NAMESPACE, "DEF")


@dataclass(frozen=True)
class _SharedGradients:
    """Gradients that are one tensor in some call: an operator may not return a tensor twice, nor one of its inputs.

    `tied` names arguments with one gradient (the operands of a sum), `passthrough` those whose gradient is the incoming
    one of the first output.
    """

    names: list[str]
    tied: tuple[str, ...]
    passthrough: tuple[str, ...]

    def ask(self, needs: Sequence[bool]) -> list[bool]:
        """What the backward operator has to compute so that every needed gradient is there."""
        asked = list(needs)
        for name in (*self.tied, *self.passthrough):
            asked[self.names.index(name)] = False
        if self.tied:
            asked[self.names.index(self.tied[0])] = any(needs[self.names.index(name)] for name in self.tied)
        return asked

    def spread(self, results: list[Any], needs: Sequence[bool], incoming: torch.Tensor | None) -> list[Any]:
        """Hands the computed gradients to all that share them."""
        one = results[self.names.index(self.tied[0])] if self.tied else None
        for name in self.tied:
            results[self.names.index(name)] = one if needs[self.names.index(name)] else None
        for name in self.passthrough:
            results[self.names.index(name)] = incoming if needs[self.names.index(name)] else None
        return results


class Make(NamedTuple):
    """An argument of an op, one of a list if it has a `member`, that is made of the values of another one."""

    argument: str
    member: int | None
    maker: SemanticOp
    encoded: bool = False


class SemanticOp:
    """A named computation with a reference, a forward that keeps residuals, and a hand-derived backward.

    Attributes:
        name, family: the op's name, and the family that reports count it under (`norm`, `lora`, ...).
        arguments, outputs, residuals: the parsed schema; residuals come after the outputs and carry no gradient.
        reference: plain PyTorch from the arguments to the outputs, differentiable by autograd, in any dtype.
        cost: the least work of a forward and a backward.
        forms: the implementations; the `forward` and `backward` given here are its PyTorch form.
        target: the registered operator, which returns outputs and residuals.
        run: a function that does the same for a graph that runs eagerly, past the dispatcher; it keeps residuals.

    `saves` names what the backward takes, out of arguments, outputs and residuals. One that only some gradients read
    has a condition in `saved_if`, which is asked with `wanted` and the arguments by name; where it fails the backward
    gets None. As it may still have to know the dtype of that tensor, or list, it gets `<name>_dtype` as well. `read_by`
    names arguments that just one output depends on, by its position: without a gradient for that output they get none.
    `tied` arguments share one gradient, that of the first, unless the optional argument `untied_by` is given.
    An op that `foresees` has its forward told what will be `wanted` of the backward, to make it on the way. The
    backward is told by `spent` whether it is the last to read what was saved: gradients that the forward made then need
    not be copied. The backward of one that `spends` is told the same of its residuals where only `run` had them: it may
    then write over them. `spares` names large residuals that a form's `restore`, or else the forward, makes again, bit
    for bit, of the rest of what is saved, which has all tensors that the op takes (`sparing.py`). `decodes` names
    frozen matrices that all forms read in no other way than `encoded.py` has it. `again` is for ops that are cheap, and
    keep for their own backward what their first output can be made from: the op that makes it (None for itself), and
    what its arguments are called here if otherwise. One without a backward `is_constant`: its results carry no
    gradient, as the model stops it there. Outputs of one that `gives` them away have memory of their own, and no form
    reads them again: the graph may write to them. `samples` makes a meaningful value, for replays on random ones, of an
    argument for which a random tensor would be none, from all the tensors that the op is given, by name. `choices` are
    all the values that a string argument may have.
    """

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
        foresees: bool = False,
        spends: bool = False,
        spares: tuple[str, ...] = (),
        decodes: tuple[str, ...] = (),
        again: tuple[SemanticOp | None, dict[str, str]] | None = None,
        gives: bool = False,
        samples: dict[str, Sample] | None = None,
        choices: dict[str, tuple[str, ...]] | None = None,
        cost: Cost | None = None,
    ) -> None:
        self.name, self.family, self.schema = name, family, schema
        self.reference = reference
        self.is_constant = backward is None
        self.forms = Forms(name, Form("pytorch", forward) if backward is None else Form("pytorch", forward, backward))
        self.arguments, results = parse(schema)
        self.outputs, self.residuals = results[:outputs], results[outputs:]
        self.tensors = tuple(a for a in self.arguments if a.is_tensor)
        self.constants = tuple(a for a in self.arguments if not a.is_tensor)
        names = [a.name for a in self.tensors]
        self._tied, self._untied = (_SharedGradients(names, together, passthrough) for together in (tied, ()))
        named = {a.name: a for a in (*self.tensors, *results)}
        self.saved = tuple(named[s] for s in saves)
        self.leaves, self.saved_leaves = Leaves(self.arguments), Leaves(self.saved)
        self.output_leaves, self.residual_leaves = Leaves(self.outputs), Leaves(self.residuals)
        self._result_leaves = Leaves(results)
        self.names, self.result_names = tuple(a.name for a in self.arguments), tuple(r.name for r in results)
        self._known = set(self.names)
        self._required = {a.name for a in self.arguments if not a.is_optional}
        self._lists = [i for i, a in enumerate(self.arguments) if a.is_list]
        self._saved_at = [(*self.names, *self.result_names).index(a.name) for a in self.saved]
        self._untied_at = None if untied_by is None else self.names.index(untied_by)
        self._constants_at = [self.names.index(a.name) for a in self.constants]
        self.saved_if = saved_if or {}
        self.backward_names = (
            *(a.name for a in self.saved),
            *(f"{name}_dtype" for name in self.saved_if),
            *(a.name for a in self.constants),
        )
        self._read_by = read_by or {}
        self.foresees, self.spends, self.spares, self._again = foresees, spends, spares, again
        self.decodes, self.cost = decodes, cost
        self.gives, self.samples, self.choices = gives, samples or {}, choices or {}
        self._register(schema)

    def __repr__(self) -> str:
        return f"<op {self.name}>"

    def __call__(self, **arguments: Any) -> Any:
        """Runs the op on keyword arguments; returns its output, or a tuple of them, without the residuals."""
        results = self.target(*self.order(arguments))
        results = results if len(self.outputs) + len(self.residuals) > 1 else (results,)
        return results[0] if len(self.outputs) == 1 else tuple(results[: len(self.outputs)])

    def order(self, arguments: dict[str, Any]) -> list[Any]:
        """What to call `target` with: `arguments` in the schema's order; an optional tensor may be left out."""
        if not (self._required.issubset(arguments) and self._known.issuperset(arguments)):  # as Dynamo can trace it
            unknown, missing = set(arguments) - self._known, self._required - set(arguments)
            raise TypeError(f"{self.name}{self.schema}: unknown {sorted(unknown)}, missing {sorted(missing)}")
        values: list[Any] = [arguments.get(name) for name in self.names]
        if self._lists:
            length = next((len(values[i]) for i in self._lists if values[i]), 0)
            for i in self._lists:
                values[i] = [None] * length if values[i] is None else values[i]
        return [*values, []] if self.foresees else values

    def wanted(self, needs: Sequence[bool]) -> Wanted:
        """The flat `needs` of the tensor leaves, by argument."""
        return self.leaves.named(needs)

    def reached(self, needs: Sequence[bool], grads: Sequence[torch.Tensor | None]) -> list[bool]:
        """`needs` without what only outputs without a gradient read: outside the op, those would get none either."""
        wanted = self.wanted(needs)
        for name, output in self._read_by.items():
            if grads[output] is None:
                wanted[name] = [False] * len(wanted[name]) if isinstance(wanted[name], list) else False
        lists = [g for g in self.output_leaves.grouped(grads) if isinstance(g, list)]
        if lists:
            alive = [any(g is not None for g in member) for member in zip(*lists, strict=True)]
            for name, need in wanted.items():
                if isinstance(need, list):
                    wanted[name] = [n and a for n, a in zip(need, alive, strict=True)]
        return self.leaves.of_gradients(wanted, wanted)

    def sharing(self, values: Sequence[Any]) -> _SharedGradients:
        """Which gradients are one tensor in a call with these `values`, in the schema's order."""
        return self._tied if self._untied_at is None or values[self._untied_at] is None else self._untied

    def _register(self, schema: str) -> None:
        saved = "".join(f", Tensor?{'[]' * a.is_list} {a.name}" for a in self.saved)
        dtypes = "".join(f", ScalarType? {name}_dtype" for name in self.saved_if)
        constants = "".join(f", {a.type} {a.name}" for a in self.constants)
        backward_schema = f"(Tensor?[] grads, bool[] needs{saved}{dtypes}{constants}) -> Tensor[]"
        forward_schema = schema.replace(") ->", ", bool[] needs) ->", 1) if self.foresees else schema
        for name, text in ((self.name, forward_schema), (f"{self.name}_backward", backward_schema)):
            _library.define(name + text)
        self.target = getattr(getattr(torch.ops, NAMESPACE), self.name).default
        self.backward_target = getattr(getattr(torch.ops, NAMESPACE), f"{self.name}_backward").default
        for name, run in ((self.name, self._run_forward), (f"{self.name}_backward", self._run_backward)):
            _library.impl(name, run, "CompositeExplicitAutograd")
            torch.library.register_fake(f"{NAMESPACE}::{name}", partial(run, fake=True), lib=_library)
        _library.impl(self.name, self._run_autograd, "Autograd")
        self.run = _function(self.name, partial(self._differentiable, handed_out=self.output_leaves))

    def _run_forward(self, *values: Any, fake: bool = False) -> Any:
        tensors = self.leaves.flat(values)
        named = dict(zip(self.names, values, strict=False))
        if self.foresees:
            named["wanted"] = self.wanted(values[-1] or [False] * len(tensors))
        anchor = next(t for t in tensors if t is not None)
        form = self.forms.pytorch if fake else self.forms.forward(anchor, named)
        results = dispatch.run(self.name, form.forward, anchor, named)
        return results if len(results) > 1 else results[0]

    def _run_backward(
        self,
        grads: Sequence[torch.Tensor | None],
        needs: Sequence[bool],
        *values: Any,
        fake: bool = False,
        spent: bool = False,
    ) -> list[Any]:
        wanted = self.wanted(needs)
        named = dict(zip(self.backward_names, values, strict=True))
        named["wanted"], named["grads"] = wanted, self.output_leaves.grouped(grads)
        if self.foresees or self.spends:
            named["spent"] = spent
        anchor = next(g for g in grads if g is not None)
        form = self.forms.pytorch if fake else self.forms.backward(anchor, named)
        gradients = dispatch.run(f"{self.name}_backward", form.backward, anchor, named)
        flat = self.leaves.of_gradients(gradients, wanted)
        return [g for g, need in zip(flat, needs, strict=True) if need]

    def makes_again(self) -> tuple[SemanticOp, list[str]] | None:
        """The op that makes this one's first output again, and what its arguments are called here, in order."""
        if self._again is None:
            return None
        maker, others = self._again
        op = maker or self
        return op, [others.get(name, name) for name in op.names]

    def making(self, makes: Sequence[Make]) -> Callable[..., Any]:
        """As `run`, but arguments are made of other ops' values, which follow this one's own in the order of `makes`.
        One that the forward has is made again for the backward instead of being kept, which saves memory where that
        op's values are kept anyway; one that is encoded is left out among this one's own values.

        Raises:
            ValueError: for an argument that the op does not save, or, encoded, that it does not take so.
        """
        plans = []
        at = len(self.names)
        for make in makes:
            if make.argument not in (a.name for a in self.saved):
                raise ValueError(f"{self.name} does not save {make.argument!r}")
            if make.encoded and make.argument not in self.decodes:
                raise ValueError(f"{self.name} takes no encoded {make.argument!r}")
            saved = next(i for i, a in enumerate(self.saved) if a.name == make.argument)
            place = self.names.index(make.argument), make.member, saved, make.encoded, make.maker
            plans.append((place, slice(at, at := at + len(make.maker.names))))

        def call(values: tuple[Any, ...]) -> Any:
            made = tuple(Made(*place, values[own]) for place, own in plans)
            return self._differentiable(values[: len(self.names)], self.output_leaves, made)

        makers = "_".join(f"{make.argument}_by_{make.maker.name}" for make in makes)
        return _function(f"{self.name}_making_{makers}", call)

    def _run_autograd(self, *values: Any) -> Any:
        return self._differentiable(values, self._result_leaves)

    def _differentiable(self, values: tuple[Any, ...], handed_out: Leaves, made: tuple[Made, ...] = ()) -> Any:
        """Runs the op, and has autograd know of it; hands out results, or outputs only, as one tensor or a tuple."""
        tensors = self.leaves.flat(values)
        needed = any(t is not None and t.requires_grad for t in tensors)
        if needed and torch.is_grad_enabled() and not self.is_constant:
            owns = handed_out is self.output_leaves
            results = handed_out.grouped(Apply.apply(self, values, owns, made, *tensors))
            return tuple(results) if len(self.result_names) > 1 else results[0]
        return self.below_autograd(tensors, with_encoded(values, made))

    def below_autograd(self, tensors: Sequence[torch.Tensor | None], values: Sequence[Any]) -> Any:
        """Runs the forward operator on its `values`, the tensors among which are given as well; encoded ones count as
        the plain ones that they are made of."""
        if dispatch.unheard(tensors):
            with torch._C.DisableTorchFunctionSubclass():  # as 4-bit parameters are, whose attributes take microseconds
                return self._run_forward(*values)
        with torch._C._AutoDispatchBelowAutograd():
            return self.target(*decoded(values))

    def differentiate(
        self,
        grads: list[torch.Tensor | None],
        asked: list[bool],
        saved: Sequence[torch.Tensor | None],
        *values: Any,
        owned: bool,
    ) -> list[torch.Tensor]:
        """Runs the backward operator on its `values`, whose tensors `saved` has as a flat list, but for those that
        others make for it; residuals among them are `owned` if nobody else has them."""
        if dispatch.unheard(grads) and dispatch.unheard(saved):
            may_spend = self.foresees or (self.spends and owned)
            with torch._C.DisableTorchFunctionSubclass():
                return self._run_backward(grads, asked, *values, spent=may_spend and dispatch.is_last_backward())
        return self.backward_target(grads, asked, *decoded(values))

    def rehearse(self, values: Sequence[Any], needs: Sequence[bool]) -> None:
        """Runs forward and backward on tensors without memory, for what the forms do on the way.

        Args:
            values: the arguments in the schema's order, tensors on the device "meta".
            needs: which gradients of the tensor leaves are wanted.
        """
        results = self._run_forward(*values[: len(self.names)], *([needs] if self.foresees else []))
        results = results if len(self.result_names) > 1 else (results,)
        grads = [None if t is None else torch.empty_like(t) for t in self.output_leaves.flat(results)]
        asked = self.sharing(values).ask(self.reached(needs, grads))
        if any(asked) and not self.is_constant:
            saved, constants = self.to_save(needs, values, results)
            self._run_backward(grads, asked, *saved, *constants, spent=True)  # as in most steps

    def to_save(
        self, needs: Sequence[bool], values: Sequence[Any], results: Sequence[Any]
    ) -> tuple[list[Any], list[Any]]:
        """What the backward takes: tensors, None where no wanted gradient reads one, and dtypes and constants."""
        everything = (*values[: len(self.names)], *results)
        saved, constants = [everything[i] for i in self._saved_at], [values[i] for i in self._constants_at]
        if not self.saved_if:
            return saved, constants
        named = dict(zip((*self.names, *self.result_names), everything, strict=True))
        wanted = self.wanted(needs)
        dropped = {name for name, hold in self.saved_if.items() if not hold(wanted, named)}
        saved = [_nothing(t) if a.name in dropped else t for a, t in zip(self.saved, saved, strict=True)]
        return saved, [*(_dtype(named[name]) for name in self.saved_if), *constants]


class Call(NamedTuple):
    """An op with its arguments in the schema's order, whose tensors have no memory, and the gradients it wants."""

    op: SemanticOp
    values: Sequence[Any]
    needs: Sequence[bool]


def _function(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function of that name, as graphs want them as targets."""

    def run(*values: Any) -> Any:
        return call(values)

    run.__name__ = run.__qualname__ = name
    return run


def _dtype(value: Any) -> torch.dtype | None:
    """A tensor's dtype, or that of the tensors of a list."""
    if isinstance(value, list):
        return next((t.dtype for t in value if t is not None), None)
    return None if value is None else value.dtype


def _nothing(value: Any) -> list[None] | None:
    return [None] * len(value) if isinstance(value, list) else None


def op(name: str, **declaration: Any) -> SemanticOp:
    """Declares and registers a semantic op; see `SemanticOp` and this module's docstring for the parts."""
    return SemanticOp(name, **declaration)
