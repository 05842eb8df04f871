"""Precision of ops: rounding errors against eager's, propagation of infs and nans, and derivatives by sympy.

For every output and every gradient, with the reference in float64 as the truth, the tests require

    err(op) <= 1.25 * err(eager) + floor          err: the largest error of an element
    floor = (2 eps + sqrt(n) eps32) * max |truth|

err(eager) is its largest error at the given inputs, and if necessary at nearby ones, with some of its inputs and
intermediate results moved by an ulp: with few elements, or if terms cancel, eager may be exact by chance. In the floor,
eps is that of the coarsest dtype: one rounding of the result (eps / 2) and three of intermediate results. eps32 is
float32's: sums are computed at least in float32, and changing the order of a sum of n terms, where n is the longest
dimension of an argument, changes it by about sqrt(n) roundings. Errors in subnormal numbers are compared with the ulp
of the smallest normal number.

The maximum over few elements is a coarse measure, so `assert_precise_on_average` requires the same ratio of root mean
squares on tensors large enough to average out chance, with a floor of one ulp of each result's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from hypothesis import strategies as st
from op_cases import DEVICE, Arguments, Result, bf16, cotangents, evaluate, f64, leaves, on_device, replaced
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastlora.kernels.core.implementations import restricted
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.tools.bench.accuracy import in_float64

RATIO = 1.25
_TRIES = 64


# ---- drawing arguments

sizes = st.sampled_from([1, 2, 3, 5, 8, 13, 16, 31])


@st.composite
def dtypes(draw: st.DrawFn) -> torch.dtype:
    """Draw float32, bfloat16 or float16; Triton's interpreter does not support bfloat16."""
    interpreted = restricted.to == "triton" and DEVICE.type == "cpu"
    return draw(
        st.sampled_from([torch.float32, torch.float16] if interpreted else [torch.float32, bf16, torch.float16])
    )


_layouts = st.sampled_from(["contiguous", "sliced", "transposed", "expanded"])
_magnitudes = st.sampled_from([1.0, 1.0, 30.0, 1e-3])


@st.composite
def tensors(draw: st.DrawFn, shape: Sequence[int], dtype: torch.dtype, magnitude: float | None = None) -> torch.Tensor:
    """Draw a tensor of any memory layout and magnitude; sometimes all its elements are equal."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    layout = draw(_layouts)
    scale = draw(_magnitudes) if magnitude is None else magnitude

    def randn(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, dtype=f64, generator=generator) * scale).to(dtype)

    if draw(st.integers(0, 9)) == 9:
        return torch.full(tuple(shape), scale, dtype=dtype)
    if layout == "sliced":
        return randn(*(2 * n + 1 for n in shape))[tuple(slice(1, None, 2) for _ in shape)]
    if layout == "transposed" and len(shape) > 1:
        *rest, m, n = shape
        return randn(*rest, n, m).transpose(-1, -2)
    if layout == "expanded":
        return randn(1, *shape[1:]).expand(*shape)
    return randn(*shape)


# ---- errors


def _error(value: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return elementwise |value - truth|: infinite where only the value is not finite, 0 where the truth is not."""
    error = (value.double() - truth).abs().nan_to_num(nan=math.inf)
    return error.where(truth.isfinite(), 0)


def _largest(error: torch.Tensor) -> float:
    return error.max().item() if error.numel() else 0.0


def _root_mean_square(error: torch.Tensor) -> float:
    return error.square().mean().sqrt().item()


def _move(t: torch.Tensor, eps: float, generator: torch.Generator) -> torch.Tensor:
    """Return t with one element in eight moved up or down by an ulp, given as eps."""
    steps = torch.randint(-8, 9, t.shape, generator=generator).div(8, rounding_mode="trunc").to(t.device)
    ulps = eps * t.double().abs().clamp(min=torch.finfo(t.dtype).smallest_normal)
    return (t.double() + steps * ulps).to(t.dtype)


class _OtherRoundings(TorchDispatchMode):
    """Moves some results of operators by an ulp, as if rounded in the other direction."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator = generator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(r.alias_info is not None for r in func._schema.returns):
            return result
        return tree_map_only(torch.Tensor, self._round, result)

    def _round(self, t: torch.Tensor) -> torch.Tensor:
        return _move(t, torch.finfo(t.dtype).eps, self.generator) if t.is_floating_point() else t


def _other_errors(op: SemanticOp, arguments: Arguments, seed: int) -> dict[str, float]:
    """Return eager's errors at nearby inputs, moved by an ulp of the coarsest dtype, with other roundings."""
    generator = torch.Generator().manual_seed(seed)
    eps = _coarsest(arguments).eps
    nearby = replaced(arguments, {n: _move(t, eps, generator) for n, t in leaves(arguments).items()})
    with _OtherRoundings(generator):
        result = evaluate(op.reference, nearby)
    return _errors(result, _truth(op, nearby, result.outputs), _largest)


def _truth(op: SemanticOp, arguments: Arguments, outputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return outputs and gradients of the reference in float64."""
    grads = [g.double() for g in cotangents(outputs)]
    return evaluate(op.reference, in_float64(arguments), grads=grads).values()


def _errors(result: Result, truth: dict[str, torch.Tensor], norm: Callable[[torch.Tensor], float]) -> dict[str, float]:
    values = result.values()
    assert {n: v.shape for n, v in values.items()} == {n: v.shape for n, v in truth.items()}
    return {n: norm(_error(v, truth[n])) for n, v in values.items()}


def _coarsest(arguments: Arguments) -> torch.finfo:
    found = [v for v in arguments.values() if isinstance(v, torch.dtype)] + [
        t.dtype for t in leaves(arguments).values()
    ]
    return max((torch.finfo(dtype) for dtype in found), key=lambda info: info.eps)


def assert_as_precise(op: SemanticOp, arguments: Arguments) -> None:
    """Assert the rule of the module's docstring; eager is evaluated at nearby inputs only if necessary."""
    arguments = {n: on_device(v) for n, v in arguments.items()}
    result = evaluate(op, arguments)
    truth = _truth(op, arguments, result.outputs)
    errors = _errors(result, truth, _largest)
    eager = _errors(evaluate(op.reference, arguments), truth, _largest)
    info = _coarsest(arguments)
    magnitudes = {n: _largest(t.abs().where(t.isfinite(), 0)) for n, t in truth.items()}
    longest = max(max(t.shape, default=1) for t in leaves(arguments).values())
    relative = 2 * info.eps + math.sqrt(longest) * torch.finfo(torch.float32).eps
    floors = {n: relative * max(m, info.smallest_normal) for n, m in magnitudes.items()}
    for seed in range(_TRIES):
        if all(error <= RATIO * eager[n] + floors[n] for n, error in errors.items()):
            return
        eager = {n: max(e, eager[n]) for n, e in _other_errors(op, arguments, seed).items()}
    for name, error in errors.items():
        bound = f"{RATIO} * {eager[name]:.3g} (eager) + {floors[name]:.3g}"
        assert error <= RATIO * eager[name] + floors[name], f"{name}: error {error:.3g} > {bound}"


def assert_precise_on_average(op: SemanticOp, arguments: Arguments) -> None:
    """Assert the rule for root mean square errors, for arguments of at least a few hundred elements."""
    result = evaluate(op, arguments)
    truth = _truth(op, arguments, result.outputs)
    eager = _errors(evaluate(op.reference, arguments), truth, _root_mean_square)
    for name, error in _errors(result, truth, _root_mean_square).items():
        floor = torch.finfo(result.values()[name].dtype).eps * _root_mean_square(truth[name])
        bound = f"{RATIO} * {eager[name]:.3g} (eager) + {floor:.3g}"
        assert error <= RATIO * eager[name] + floor, f"{name}: error {error:.3g} > {bound}"


def assert_rounded_once(op: SemanticOp, arguments: Arguments) -> None:
    """Assert that outputs and gradients are the truth rounded once, up to errors of float32 arithmetic."""
    result = evaluate(op, arguments)
    truth = _truth(op, arguments, result.outputs)
    for name, value in result.values().items():
        nearest = torch.finfo(value.dtype).eps / 2 * truth[name].abs()
        wide = 4 * torch.finfo(torch.float32).eps * truth[name].abs().max()
        assert ((value.double() - truth[name]).abs() <= nearest + wide).all(), name


def assert_rounded(value: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype | None = None) -> None:
    """Assert that each element is the truth rounded once to `dtype`, up to errors of float32 sums."""
    nearest = torch.finfo(dtype or value.dtype).eps / 2 * truth.abs()
    wide = 64 * torch.finfo(torch.float32).eps * truth.abs().max()
    worst = ((value.double() - truth).abs() - nearest - wide).max()
    assert worst <= 0, f"off by {worst:.3g} more than a rounding"


def assert_propagates(op: SemanticOp, arguments: Arguments) -> None:
    """Assert that with one inf, -inf or nan in any argument, results are finite exactly where the reference's are."""
    for name, tensor in leaves(arguments).items():
        for bad in (math.inf, -math.inf, math.nan):
            spoiled = tensor.clone()
            spoiled.view(-1)[spoiled.numel() // 2] = bad
            given = replaced(arguments, {name: spoiled})
            expected = evaluate(op.reference, given).values()
            for what, value in evaluate(op, given).values().items():
                same = torch.equal(value.isfinite(), expected[what].isfinite())
                assert same, f"{what} with {bad} in {name}:\n{value}\nreference:\n{expected[what]}"


# ---- sympy


def symbols(name: str, count: int) -> list[sympy.Symbol]:
    return list(sympy.symbols(f"{name}:{count}", real=True))


def random_point(*groups: Sequence[sympy.Symbol], seed: int = 0) -> dict[sympy.Symbol, float]:
    """Return a number for each symbol."""
    names = [s for group in groups for s in group]
    generator = torch.Generator().manual_seed(seed)
    return dict(zip(names, torch.randn(len(names), dtype=f64, generator=generator).tolist(), strict=True))


def at(point: dict[sympy.Symbol, float], group: Sequence[sympy.Symbol]) -> torch.Tensor:
    return torch.tensor([point[s] for s in group], dtype=f64)


def value(expression: sympy.Expr, point: dict[sympy.Symbol, float]) -> float:
    """Evaluate the expression at the point, with 30 digits."""
    return float(expression.evalf(30, subs=point))


def gradient(expression: sympy.Expr, group: Sequence[sympy.Symbol], point: dict[sympy.Symbol, float]) -> torch.Tensor:
    """Return sympy's derivatives of the expression with respect to the symbols of the group, at the point."""
    return torch.tensor([value(sympy.diff(expression, s), point) for s in group], dtype=f64)


def assert_derived(code: torch.Tensor, derived: torch.Tensor) -> None:
    """Assert that results of the code and of sympy agree up to rounding in float64."""
    torch.testing.assert_close(code, derived, rtol=1e-12, atol=1e-12)
