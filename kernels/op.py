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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastlora.kernels.forms import Form, Forms
from fastlora.kernels.schema import flatten, leaves, parse, unflatten

Gradients = dict[str, Any]
Wanted = dict[str, Any]
"""Which gradients are wanted, by argument: a bool, or a list of them for a list of tensors."""
SavedIf = Callable[[Wanted, dict[str, Any]], bool]


def _digest(folder: Path) -> str:
    """A digest of a folder's sources: AOTAutograd's cache keys on operator names, and would serve a stale backward."""
    sources = sorted(folder.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:10]


NAMESPACE = f"fastlora_{_digest(Path(__file__).parent)}"
_library = torch.library.Library(NAMESPACE, "DEF")


@contextmanager
def _ambient(anchor: torch.Tensor) -> Iterator[None]:
    """Where a form runs: on the tensors' GPU, and without autocast, as ops state the dtype of every product."""
    with ExitStack() as stack:
        if anchor.is_cuda and torch.cuda.is_initialized() and anchor.device.index != torch.cuda.current_device():
            stack.enter_context(torch.cuda.device(anchor.device))
        if torch.is_autocast_enabled(anchor.device.type):
            stack.enter_context(torch.autocast(anchor.device.type, enabled=False))
        yield


@dataclass(frozen=True)
class _SharedGradients:
    """Gradients that are one tensor: an operator may not return a tensor twice, nor one of its inputs.

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


class SemanticOp:
    """A named computation with a reference, a forward that keeps residuals, and a hand-derived backward.

    Attributes:
        name, family: the op's name, and the family that reports count it under (`norm`, `lora`, ...).
        arguments, outputs, residuals: the parsed schema; residuals come after the outputs and carry no gradient.
        reference: plain PyTorch from the arguments to the outputs, differentiable by autograd, in any dtype.
        forms: the implementations; the `forward` and `backward` given here are its PyTorch form.
        target: the registered operator, which returns outputs and residuals.

    `saves` names what the backward takes, out of arguments, outputs and residuals. One that only some gradients read
    has a condition in `saved_if`, which is asked with `wanted` and the arguments by name; where it fails the backward
    gets None. As it may still have to know the dtype of that tensor, it gets `<name>_dtype` as well. `read_by` names
    arguments that just one output depends on, by its position: without a gradient for that output they get none. An op
    that `foresees` has its forward told what will be `wanted` of the backward, to make those gradients on the way.
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
        backward: Callable[..., Gradients],
        saves: tuple[str, ...],
        saved_if: dict[str, SavedIf] | None = None,
        tied: tuple[str, ...] = (),
        passthrough: tuple[str, ...] = (),
        read_by: dict[str, int] | None = None,
        foresees: bool = False,
    ) -> None:
        self.name, self.family, self.schema = name, family, schema
        self.reference = reference
        self.forms = Forms(name, Form("pytorch", forward, backward))
        self.arguments, results = parse(schema)
        self.outputs, self.residuals = results[:outputs], results[outputs:]
        self.tensors = tuple(a for a in self.arguments if a.is_tensor)
        self.constants = tuple(a for a in self.arguments if not a.is_tensor)
        self.shared = _SharedGradients([a.name for a in self.tensors], tied, passthrough)
        named = {a.name: a for a in (*self.tensors, *results)}
        self.saved = tuple(named[s] for s in saves)
        self.saved_if = saved_if or {}
        self._read_by = read_by or {}
        self.foresees = foresees
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
        unknown = set(arguments) - {a.name for a in self.arguments}
        missing = {a.name for a in self.arguments if not a.is_optional} - set(arguments)
        if unknown or missing:
            raise TypeError(f"{self.name}{self.schema}: unknown {sorted(unknown)}, missing {sorted(missing)}")
        length = next((len(arguments[a.name]) for a in self.arguments if a.is_list and arguments.get(a.name)), 0)
        absent = {a.name: [None] * length if a.is_list else None for a in self.arguments}
        values = [absent[a.name] if arguments.get(a.name) is None else arguments[a.name] for a in self.arguments]
        return [*values, []] if self.foresees else values

    def wanted(self, needs: Sequence[bool]) -> Wanted:
        """The flat `needs` of the tensor leaves, by argument."""
        return dict(zip((a.name for a in self.tensors), unflatten(self.tensors, needs), strict=True))

    def reached(self, needs: Sequence[bool], grads: Sequence[torch.Tensor | None]) -> list[bool]:
        """`needs` without what only outputs without a gradient read: outside the op, those would get none either."""
        needs = [
            need and not (name in self._read_by and grads[self._read_by[name]] is None)
            for name, need in zip(self._leaf_names(needs), needs, strict=True)
        ]
        lists = [g for a, g in zip(self.outputs, unflatten(self.outputs, grads), strict=True) if a.is_list]
        if not lists:
            return list(needs)
        alive = [any(g is not None for g in member) for member in zip(*lists, strict=True)]
        reached = []
        for argument, wanted in zip(self.tensors, unflatten(self.tensors, needs), strict=True):
            reached += [n and a for n, a in zip(wanted, alive, strict=True)] if argument.is_list else [wanted]
        return reached

    def _leaf_names(self, needs: Sequence[bool]) -> list[str]:
        grouped = zip(self.tensors, unflatten(self.tensors, needs), strict=True)
        return [a.name for a, wanted in grouped for _ in (wanted if a.is_list else [wanted])]

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

    def _run_forward(self, *values: Any, fake: bool = False) -> Any:
        needs: list[bool] = []
        if self.foresees:
            *values, needs = values
        named = dict(zip((a.name for a in self.arguments), values, strict=True))
        if self.foresees:
            named["wanted"] = self.wanted(needs or [False] * len(list(flatten(self.arguments, values))))
        anchor = next(t for t in flatten(self.arguments, values) if t is not None)
        form = self.forms.pytorch if fake else self.forms.forward(anchor, named)
        with _ambient(anchor):
            results = form.forward(**named)
        return results if len(results) > 1 else results[0]

    def _run_backward(
        self, grads: Sequence[torch.Tensor | None], needs: Sequence[bool], *values: Any, fake: bool = False
    ) -> list[Any]:
        dtypes = [f"{name}_dtype" for name in self.saved_if]
        names = [*(a.name for a in self.saved), *dtypes, *(a.name for a in self.constants)]
        named = dict(zip(names, values, strict=True))
        named |= {"wanted": self.wanted(needs), "grads": unflatten(self.outputs, grads)}
        anchor = next(g for g in grads if g is not None)
        form = self.forms.pytorch if fake else self.forms.backward(anchor, named)
        with _ambient(anchor):
            gradients = form.backward(**named)
        flat = [g for a in self.tensors for g in leaves(a, gradients.get(a.name), named["wanted"][a.name])]
        return [g for g, need in zip(flat, needs, strict=True) if need]

    def _run_autograd(self, *values: Any) -> Any:
        tensors = list(flatten(self.arguments, values[: len(self.arguments)]))
        if not torch.is_grad_enabled() or not any(t is not None and t.requires_grad for t in tensors):
            with torch._C._AutoDispatchBelowAutograd():
                return self.target(*values)
        flat = _Apply.apply(self, values, *tensors)
        results = unflatten((*self.outputs, *self.residuals), flat)
        return tuple(results) if len(results) > 1 else results[0]


class _Apply(torch.autograd.Function):
    """Connects an op's forward and backward operators; the leaves of its tensor arguments come flat."""

    @staticmethod
    def forward(ctx: Any, op: SemanticOp, values: tuple[Any, ...], *tensors: torch.Tensor | None) -> Any:
        needs = ctx.needs_input_grad[2:]
        with torch._C._AutoDispatchBelowAutograd():
            results = op.target(*values[: len(op.arguments)], needs) if op.foresees else op.target(*values)
        declared = (*op.outputs, *op.residuals)
        results = results if len(declared) > 1 else (results,)
        outputs, residuals = results[: len(op.outputs)], results[len(op.outputs) :]
        named = dict(zip((a.name for a in op.arguments), values, strict=False))
        named.update(zip((r.name for r in declared), results, strict=True))
        wanted = op.wanted(needs)
        dtypes = [None if named[name] is None else named[name].dtype for name in op.saved_if]
        ctx.op, ctx.constants = op, [*dtypes, *(named[a.name] for a in op.constants)]
        named.update({name: None for name, condition in op.saved_if.items() if not condition(wanted, named)})
        ctx.lengths = [len(named[a.name]) if a.is_list else None for a in op.saved]
        ctx.save_for_backward(*flatten(op.saved, [named[a.name] for a in op.saved]))
        flat_outputs, flat_residuals = list(flatten(op.outputs, outputs)), list(flatten(op.residuals, residuals))
        ctx.outputs = len(flat_outputs)
        ctx.mark_non_differentiable(*flat_residuals)
        ctx.set_materialize_grads(False)
        return (*flat_outputs, *flat_residuals)

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
        needs = op.reached(ctx.needs_input_grad[2:], grads)
        asked = op.shared.ask(needs)
        flat = iter(ctx.saved_tensors)
        saved = [next(flat) if n is None else [next(flat) for _ in range(n)] for n in ctx.lengths]
        computed = iter(op.backward_target(list(grads), asked, *saved, *ctx.constants) if any(asked) else ())
        results = [next(computed) if ask else None for ask in asked]
        return (None, None, *op.shared.spread(results, needs, grads[0]))


def op(name: str, **declaration: Any) -> SemanticOp:
    """Declares and registers a semantic op; see `SemanticOp` and this module's docstring for the parts."""
    return SemanticOp(name, **declaration)
