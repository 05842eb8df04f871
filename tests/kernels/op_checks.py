"""What every semantic op promises, as checks that take an op and its arguments.

`CONTRACT` lists the checks of the op contract (gradients, what is asked of the backward, no hidden writes, autocast,
opcheck), which every op's test runs on its `Case`s. Rounding errors are `op_precision`'s business.
"""

from __future__ import annotations

import itertools
import math
import random
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from fastlora.kernels.core import implementations
from fastlora.kernels.core.implementations import Implementation, restricted
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.tools.bench.accuracy import flat, labelled
from fastlora.tools.bench.cases import Arguments

f64, f32, bf16, f16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on_device(value: Any) -> Any:
    """A tensor, or a list of them, on the device under test, with its strides; anything else as it is."""
    if isinstance(value, list):
        return [on_device(v) for v in value]
    if not isinstance(value, torch.Tensor) or value.device.type == DEVICE.type:
        return value
    extent = sum((n - 1) * stride for n, stride in zip(value.shape, value.stride(), strict=True)) + 1
    memory = value.as_strided((extent if value.numel() else 0,), (1,)).to(DEVICE)
    return memory.as_strided(value.shape, value.stride(), 0)


def native() -> torch.dtype:
    """The widest dtype that the form under test computes in."""
    return f32 if restricted.to == "triton" else f64


class Case:
    """An op with a way to make arguments for it in some dtype: `build(dtype, *args, **kwargs)`."""

    def __init__(self, name: str, op: SemanticOp, build: Callable[..., Arguments], *args: Any, **kwargs: Any) -> None:
        self.name, self.op = name, op
        self._build = lambda dtype: build(dtype, *args, **kwargs)

    def arguments(self, dtype: torch.dtype | None = None) -> Arguments:
        torch.manual_seed(0)
        return complete(self.op, self._build(dtype or native()))

    def __str__(self) -> str:
        return self.name


def complete(op: SemanticOp, arguments: Arguments) -> Arguments:
    """The arguments with those spelled out that were left out, on the device under test."""
    return {a.name: on_device(v) for a, v in zip(op.arguments, op.order(arguments), strict=False)}


def leaves(arguments: Arguments) -> dict[str, torch.Tensor]:
    """The floating-point tensors by name."""
    return {n: t for n, t in labelled(arguments).items() if isinstance(t, torch.Tensor) and t.is_floating_point()}


def require_every_gradient(arguments: Arguments) -> None:
    for t in leaves(arguments).values():
        t.requires_grad_()


def replaced(arguments: Arguments, new: dict[str, torch.Tensor]) -> Arguments:
    """The arguments with other tensors for some of their leaves."""
    result = {n: list(v) if isinstance(v, list) else v for n, v in arguments.items()}
    for label, tensor in new.items():
        name, _, index = label.removesuffix("]").partition("[")
        if index:
            result[name][int(index)] = tensor
        else:
            result[name] = tensor
    return result


# ---- running an op, or its reference


@dataclass
class Result:
    outputs: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]

    def gradient(self, name: str) -> torch.Tensor:
        found = self.gradients[name]
        assert found is not None, f"no gradient of {name}"
        return found

    def values(self) -> dict[str, torch.Tensor]:
        """Outputs and gradients by name, for comparisons."""
        outputs = {f"output {i}": t for i, t in enumerate(self.outputs)}
        return outputs | {f"gradient of {n}": g for n, g in self.gradients.items() if g is not None}


def cotangents(outputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Random incoming gradients, the same on every device and with all the digits of float64."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(t.shape, dtype=f64, generator=generator).to(t.dtype).to(t.device) for t in outputs]


def evaluate(
    function: Callable[..., Any],
    arguments: Arguments,
    wanted: Collection[str] | None = None,
    grads: list[torch.Tensor] | None = None,
) -> Result:
    """Outputs, and the gradients of the wanted leaves (of all, unless told) for the given or random cotangents."""
    arguments = {n: on_device(v) for n, v in arguments.items()}
    fresh = {n: t.detach().requires_grad_(wanted is None or n in wanted) for n, t in leaves(arguments).items()}
    outputs = flat(function(**replaced(arguments, fresh)))
    grads = cotangents(outputs) if grads is None else grads
    inputs = {n: t for n, t in fresh.items() if t.requires_grad}
    gradients: dict[str, torch.Tensor | None] = dict.fromkeys(fresh)
    reached = [(t, g) for t, g in zip(outputs, grads, strict=True) if t.requires_grad]
    if inputs:
        tensors, incoming = zip(*reached, strict=True)
        found = torch.autograd.grad(tensors, tuple(inputs.values()), incoming, allow_unused=True)
        gradients |= dict(zip(inputs, found, strict=True))
    return Result([t.detach() for t in outputs], gradients)


@contextmanager
def backward_calls(op: SemanticOp) -> Iterator[list[tuple[Any, ...]]]:
    """The arguments of each run of the op's backward."""
    calls: list[tuple[Any, ...]] = []

    def spy(target: Any) -> Any:
        def run(*arguments: Any, **told: Any) -> Any:
            calls.append(arguments)
            return target(*arguments, **told)

        return run

    with patch.object(op, "backward_target", spy(op.backward_target)):
        yield calls


@contextmanager
def gradients_made(op: SemanticOp) -> Iterator[list[set[str]]]:
    """The names of the gradients that the op's backward function makes in each call, asked for or not."""
    made: list[set[str]] = []
    choose = op.implementations.backward

    def spied(anchor: torch.Tensor, arguments: dict[str, Any]) -> Implementation:
        form = choose(anchor, arguments)

        def backward(**named: Any) -> dict[str, Any]:
            gradients = form.backward(**named)
            made.append({name for name, gradient in labelled(gradients).items() if gradient is not None})
            return gradients

        return replace(form, backward=backward)

    with patch.object(op.implementations, "backward", spied):
        yield made


@contextmanager
def saved_for_backward() -> Iterator[list[torch.Tensor]]:
    """The tensors that autograd saves."""
    saved: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with saved_tensors_hooks(pack, lambda t: t):
        yield saved


# ---- the contract


def assert_same_but_for_rounding(value: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Equal but for sums that were made in another order: some units in the last place of their largest summands,
    which are about one in size, or of the largest element."""
    assert value.dtype == expected.dtype, name
    allowed = 64 * torch.finfo(value.dtype).eps * max(1.0, expected.abs().max().item() if value.numel() else 0.0)
    assert ((value - expected).abs() <= allowed).all(), f"{name}:\n{value}\nexpected:\n{expected}"


def check_gradcheck(case: Case) -> None:
    if native() is not f64:
        pytest.skip("needs a form that computes in float64")
    arguments = case.arguments()
    named = leaves(arguments)

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(flat(case.op(**replaced(arguments, dict(zip(named, tensors, strict=True))))))

    assert torch.autograd.gradcheck(function, tuple(t.detach().requires_grad_() for t in named.values()))


def _subsets(names: list[str]) -> list[tuple[str, ...]]:
    """All subsets where they are few; otherwise the one-element ones, their complements, all, and some others."""
    if len(names) <= 7:
        return list(itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1)))
    rng = random.Random(0)
    others = [tuple(n for n in names if rng.random() < 0.5) for _ in range(24)]
    return [(), *((n,) for n in names), *(tuple(m for m in names if m != n) for n in names), tuple(names), *others]


def check_every_subset_of_gradients(case: Case) -> None:
    """Wanted gradients are autograd's, others None, and the backward is asked for no other and makes no other.

    A form that computes in float32 is compared with itself: a gradient does not depend on which others are wanted.
    """
    op, arguments = case.op, case.arguments()
    exact = native() is f64
    full = evaluate(op.reference if exact else op, arguments)
    for wanted in _subsets(list(leaves(arguments))):
        with backward_calls(op) as calls, gradients_made(op) as made:
            result = evaluate(op, arguments, wanted)
        for name, gradient in result.gradients.items():
            if name in wanted:
                assert_same_but_for_rounding(gradient, full.gradient(name), name)
            else:
                assert gradient is None, f"{name} got a gradient when only {wanted} wanted one"
        asked = [{n for n, need in labelled(op.wanted(needs)).items() if need} for _, needs, *_ in calls]
        assert made == asked == [expected for expected in [_computed(op, arguments, wanted)] if expected]


def _computed(op: SemanticOp, arguments: Arguments, wanted: Collection[str]) -> set[str]:
    """What has to be computed for `wanted`: tied arguments share the first's gradient, a passed-through one is free."""
    shared = op.shared_gradients(op.order(arguments))
    tied, passthrough = shared.tied, shared.passthrough
    return {tied[0] if name in tied else name for name in wanted if name not in passthrough}


def check_nothing_is_written(case: Case) -> None:
    """Inputs, saved tensors and incoming gradients keep their bits; a second backward finds the same gradients."""
    op, arguments = case.op, case.arguments(f32)
    inputs = {n: t.detach().requires_grad_() for n, t in leaves(arguments).items()}
    before = [t.detach().clone() for t in inputs.values()]
    outputs = flat(op(**replaced(arguments, inputs)))
    values = [t.detach().clone() for t in outputs]
    grads = cotangents(outputs)
    incoming = [g.clone() for g in grads]
    with backward_calls(op) as calls:
        first, second = (
            torch.autograd.grad(outputs, tuple(inputs.values()), grads, retain_graph=True) for _ in range(2)
        )
    for one, other in ((before, inputs.values()), (values, outputs), (incoming, grads), (first, second)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    saved = [[t for a in call[2:] for t in (a if isinstance(a, list) else [a])] for call in calls]
    kept = [t for t in saved[0] if isinstance(t, torch.Tensor)]
    copies = [t.clone() for t in kept]
    op.backward_target(*calls[0])
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


def check_expanded_gradient(case: Case) -> None:
    """The gradient of a sum has stride 0 everywhere."""
    arguments = case.arguments()
    outputs = flat(case.op(**arguments))
    expanded = [torch.full((), 0.7, dtype=t.dtype, device=t.device).expand(t.shape) for t in outputs]
    result = evaluate(case.op, arguments, grads=expanded)
    expected = evaluate(case.op, arguments, grads=[g.contiguous() for g in expanded])
    for name, gradient in expected.gradients.items():
        if gradient is not None:
            assert_same_but_for_rounding(result.gradient(name), gradient, name)


def check_double_backward_raises(case: Case) -> None:
    """At once, so that a second derivative which only the saved tensors would carry is not silently zero."""
    inputs = {n: t.detach().requires_grad_() for n, t in leaves(case.arguments()).items()}
    outputs = flat(case.op(**replaced(case.arguments(), inputs)))
    with pytest.raises(RuntimeError, match=f"{case.op.name} has no second derivative"):
        torch.autograd.grad(outputs, tuple(inputs.values()), cotangents(outputs), create_graph=True)


def check_autocast_is_inert(case: Case) -> None:
    arguments = case.arguments(f32)
    expected = evaluate(case.op, arguments).values()
    with torch.autocast(DEVICE.type, torch.bfloat16):
        result = evaluate(case.op, arguments).values()
    for name, value in expected.items():
        assert torch.equal(value, result[name]), name


def check_opcheck(case: Case) -> None:
    """Schema, autograd registration, fake and AOT dispatch with static and dynamic shapes; of the backward too."""
    arguments = case.arguments(f32)
    inputs = {n: t.detach().requires_grad_() for n, t in leaves(arguments).items()}
    torch.library.opcheck(case.op.target, tuple(case.op.order(replaced(arguments, inputs))))
    with backward_calls(case.op) as calls:
        evaluate(case.op, arguments)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in calls[0]]
    torch.library.opcheck(case.op.backward_target, tuple(detached), test_utils=("test_schema", "test_faketensor"))


def check_runs_are_equal(case: Case) -> None:
    """Runs give equal bits, later ones too, which may play from a tape."""
    first, *others = (evaluate(case.op, case.arguments(f32)).values() for _ in range(4))
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]), name
            assert value.stride() == other[name].stride(), name


def check_layouts(case: Case) -> None:
    """Results and gradients have the strides of the PyTorch form's, which stands for all forms while tracing."""
    op, arguments = case.op, case.arguments(f32)
    strided = {n: on_device(t.repeat_interleave(2, -1))[..., ::2] for n, t in leaves(arguments).items()}
    turned = {
        n: on_device(t.transpose(0, 1).contiguous().transpose(0, 1))
        for n, t in leaves(arguments).items()
        if t.dim() > 1
    }
    for given in (arguments, replaced(arguments, strided), replaced(arguments, turned)):
        here = evaluate(op, given).values()
        with implementations.only("pytorch"):
            there = evaluate(op, given).values()
        for name, value in there.items():
            found, expected = ((t.shape, t.dtype, t.stride()) for t in (here[name], value))
            assert found == expected, name


def check_memory(case: Case) -> None:
    """Kernels write every element of what they return, read none before, and write nothing around it."""
    if restricted.to != "triton":
        pytest.skip("only kernels write to memory by address")
    expected = evaluate(case.op, case.arguments(f32)).values()
    with guarded_memory() as check:
        result = evaluate(case.op, case.arguments(f32)).values()
    check()
    for name, value in expected.items():
        assert torch.equal(value, result[name]), name


@contextmanager
def guarded_memory() -> Iterator[Callable[[], None]]:
    """Fills what kernels allocate with nan, between two bands of nan; yields a check that the bands are untouched."""
    band, bands = 1024, []

    def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        size = math.prod(shape)
        poison = math.nan if dtype.is_floating_point else torch.iinfo(dtype).max
        memory = torch.full((size + 2 * band,), poison, dtype=dtype, device=device)
        bands.append((memory, size, poison))
        return memory[band : band + size].view(shape)

    def check() -> None:
        for memory, size, poison in bands:
            around = torch.cat((memory[:band], memory[band + size :]))
            assert (around.isnan() if math.isnan(poison) else around == poison).all()

    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("fastlora.kernels.triton") and hasattr(module, "allocate"):
                stack.enter_context(patch.object(module, "allocate", allocate))
        yield check


def check_what_is_given_may_be_written_to(case: Case) -> None:
    """Outputs that an op gives away share no memory with what it read, keeps or gives as well, and its gradients are
    the same after they were written to."""
    op, arguments = case.op, case.arguments(f32)
    if not op.policy.outputs_mutable:
        pytest.skip("it gives nothing away")
    inputs = {n: t.detach().requires_grad_() for n, t in leaves(arguments).items()}
    outputs = flat(op(**replaced(arguments, inputs)))
    expected = torch.autograd.grad(outputs, [*inputs.values()], cotangents(outputs))
    with saved_for_backward() as saved:
        outputs = flat(op(**replaced(arguments, inputs)))
    own = [t.untyped_storage().data_ptr() for t in outputs]
    others = {t.untyped_storage().data_ptr() for t in (*saved, *inputs.values())}
    assert len(set(own)) == len(own)
    assert others.isdisjoint(own)
    written = [t.mul_(3) for t in outputs]
    found = torch.autograd.grad(written, [*inputs.values()], [g / 3 for g in cotangents(outputs)])
    for name, mine, its in zip(inputs, found, expected, strict=True):
        assert_same_but_for_rounding(mine, its, name)


CONTRACT = [
    check_gradcheck,
    check_every_subset_of_gradients,
    check_nothing_is_written,
    check_what_is_given_may_be_written_to,
    check_expanded_gradient,
    check_double_backward_raises,
    check_autocast_is_inert,
    check_opcheck,
    check_runs_are_equal,
    check_layouts,
    check_memory,
]
