"""The contract of every semantic op, as checks that take a `Case`: gradients, no unneeded work, no hidden writes,
layouts, autocast, opcheck. Every op's test runs them on its cases: `@contract(CASES)`. `op_precision` checks rounding
errors.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Collection, Hashable, Sequence

import pytest
import torch
from op_cases import (
    DEVICE,
    Arguments,
    Case,
    cotangents,
    evaluate,
    f32,
    f64,
    leaves,
    native,
    on_device,
    replaced,
)
from op_spies import backward_calls, computed_gradients, guarded_memory, saved_for_backward

from fastlora.kernels.core import implementations
from fastlora.kernels.core.implementations import restricted
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.tools.bench.accuracy import expand_lists, flat


def assert_same_but_for_rounding(value: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Assert equality up to the order of sums: some ulps of their largest summands, which are about one in size, or of
    the largest element."""
    assert value.dtype == expected.dtype, name
    allowed = 64 * torch.finfo(value.dtype).eps * max(1.0, expected.abs().max().item() if value.numel() else 0.0)
    assert ((value - expected).abs() <= allowed).all(), f"{name}:\n{value}\nexpected:\n{expected}"


def check_gradcheck(case: Case) -> None:
    if native() is not f64:
        pytest.skip("needs an implementation that computes in float64")
    arguments = case.arguments()
    named = leaves(arguments)

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(flat(case.op(**replaced(arguments, dict(zip(named, tensors, strict=True))))))

    assert torch.autograd.gradcheck(function, tuple(t.detach().requires_grad_() for t in named.values()))


def _subsets(names: list[str]) -> list[tuple[str, ...]]:
    """Return all subsets if they are few; otherwise those of one element, their complements, all, and some others."""
    if len(names) <= 7:
        return list(itertools.chain.from_iterable(itertools.combinations(names, n) for n in range(len(names) + 1)))
    rng = random.Random(0)
    others = [tuple(n for n in names if rng.random() < 0.5) for _ in range(24)]
    return [(), *((n,) for n in names), *(tuple(m for m in names if m != n) for n in names), tuple(names), *others]


def check_every_subset_of_gradients(case: Case) -> None:
    """Needed gradients equal autograd's, others are None, and no other is computed.

    An implementation that computes in float32 is compared with itself: a gradient does not depend on the others.
    """
    op, arguments = case.op, case.arguments()
    exact = native() is f64
    full = evaluate(op.reference if exact else op, arguments)
    for wanted in _subsets(list(leaves(arguments))):
        with backward_calls(op) as calls, computed_gradients(op) as made:
            result = evaluate(op, arguments, wanted)
        for name, gradient in result.gradients.items():
            if name in wanted:
                assert_same_but_for_rounding(gradient, full.gradient(name), name)
            else:
                assert gradient is None, f"{name} got a gradient when only {wanted} wanted one"
        requested = [{n for n, need in expand_lists(op.wanted(needs)).items() if need} for _, needs, *_ in calls]
        assert made == requested == [expected for expected in [_computed(op, arguments, wanted)] if expected]


def _computed(op: SemanticOp, arguments: Arguments, wanted: Collection[str]) -> set[str]:
    """Return the gradients to compute for `wanted`: tied arguments share the first's, passthrough ones are free."""
    shared = op.shared_gradients(op.order(arguments))
    tied, passthrough = shared.tied, shared.passthrough
    return {tied[0] if name in tied else name for name in wanted if name not in passthrough}


def check_nothing_is_written(case: Case) -> None:
    """Inputs, saved tensors and incoming gradients are not written to; a second backward gives equal gradients."""
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
    """The incoming gradient of a sum has stride 0 in all dimensions."""
    arguments = case.arguments()
    outputs = flat(case.op(**arguments))
    expanded = [torch.full((), 0.7, dtype=t.dtype, device=t.device).expand(t.shape) for t in outputs]
    result = evaluate(case.op, arguments, grads=expanded)
    expected = evaluate(case.op, arguments, grads=[g.contiguous() for g in expanded])
    for name, gradient in expected.gradients.items():
        if gradient is not None:
            assert_same_but_for_rounding(result.gradient(name), gradient, name)


def check_double_backward_raises(case: Case) -> None:
    """In the backward itself, so that second derivatives through saved tensors are not silently zero."""
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
    """Schema, autograd registration, fake and AOT dispatch with static and dynamic shapes, also of the backward."""
    arguments = case.arguments(f32)
    inputs = {n: t.detach().requires_grad_() for n, t in leaves(arguments).items()}
    torch.library.opcheck(case.op.target, tuple(case.op.order(replaced(arguments, inputs))))
    with backward_calls(case.op) as calls:
        evaluate(case.op, arguments)
    detached = [a.detach() if isinstance(a, torch.Tensor) else a for a in calls[0]]
    torch.library.opcheck(case.op.backward_target, tuple(detached), test_utils=("test_schema", "test_faketensor"))


def check_repeated_runs_are_equal(case: Case) -> None:
    """All runs give equal bits, including later ones, which may be replayed."""
    first, *others = (evaluate(case.op, case.arguments(f32)).values() for _ in range(4))
    for other in others:
        for name, value in first.items():
            assert torch.equal(value, other[name]), name
            assert value.stride() == other[name].stride(), name


def check_layouts(case: Case) -> None:
    """Results and gradients have the strides of the PyTorch implementation, which is the one that is traced."""
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
    """Kernels write all elements of results, read none of them before, and write nothing around them."""
    if restricted.to != "triton":
        pytest.skip("only kernels write to memory by address")
    expected = evaluate(case.op, case.arguments(f32)).values()
    with guarded_memory() as check:
        result = evaluate(case.op, case.arguments(f32)).values()
    check()
    for name, value in expected.items():
        assert torch.equal(value, result[name]), name


def check_mutable_outputs(case: Case) -> None:
    """Mutable outputs share no memory with inputs, saved tensors or other outputs; writing to them changes no
    gradient."""
    op, arguments = case.op, case.arguments(f32)
    if not op.policy.outputs_mutable:
        pytest.skip("its outputs are not mutable")
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


CHECKS = (
    check_gradcheck,
    check_every_subset_of_gradients,
    check_nothing_is_written,
    check_mutable_outputs,
    check_expanded_gradient,
    check_double_backward_raises,
    check_autocast_is_inert,
    check_opcheck,
    check_repeated_runs_are_equal,
    check_layouts,
    check_memory,
)
OF_VALUES = tuple(check for check in CHECKS if check not in (check_double_backward_raises, check_opcheck))
"""The checks that depend on values, not only on the kinds of arguments."""


def contract(cases: Sequence[Case], checks: Sequence[Callable[[Case], None]] = CHECKS) -> pytest.MarkDecorator:
    """Parametrize a test with all pairs of `(case, check)`. Opcheck is slow, and depends only on the kinds of
    arguments, so it runs once per kind."""
    kinds: set[Hashable] = set()
    pairs = []
    for case in cases:
        new = (kind := case.kind()) not in kinds
        kinds.add(kind)
        pairs += [(case, check) for check in checks if check is not check_opcheck or new]
    ids = [f"{case}-{check.__name__}" for case, check in pairs]
    return pytest.mark.parametrize(("case", "check"), pairs, ids=ids)
