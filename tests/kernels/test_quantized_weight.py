"""Ops on quantized weights compute the same bits as on dequantized ones, and save no dequantized weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lora_cases import layer, scheme_of
from op_cases import Arguments, call_directly, complete, f32, on_device

from fastlora.kernels.core.call_site import call_site
from fastlora.kernels.core.recompute import recomputing
from fastlora.kernels.core.semantic_op import DerivedArgument, SemanticOp
from fastlora.kernels.ops import dequantize_4bit, glu, lora_group, lora_linear, lora_mlp

IMPLEMENTATIONS = ["pytorch", "triton"]
T, H, I, R = 24, 64, 96, 4


def encoding(rows: int, cols: int, nested: bool = True) -> list[Any]:
    """Return arguments of `dequantize_4bit` for a random matrix, in the schema's order."""
    blocks = rows * cols // 64
    given: Arguments = {
        "packed": torch.randint(256, (rows * cols // 2, 1), dtype=torch.uint8),
        "absmax": torch.randint(256, (blocks,), dtype=torch.uint8) if nested else torch.rand(blocks),
        "blocksize": 64, "nested_blocksize": 256, "quant_type": "nf4", "rows": rows, "cols": cols, "dtype": f32,
    }  # fmt: skip
    if nested:
        given |= {"nested_absmax": torch.rand(1), "nested_code": torch.linspace(-1, 1, 256), "offset": torch.rand(())}
    return [on_device(value) for value in dequantize_4bit.order(given)]


def members(*shapes: tuple[int, int]) -> list[dict[str, Any]]:
    return [layer(scheme_of(f32), n, k, R, False) for n, k in shapes]


def linear() -> Arguments:
    scheme = scheme_of(f32)
    return {"x": torch.randn(T, H), **layer(scheme, I, H, R, True), **scheme.attributes()}


def group() -> Arguments:
    scheme, made = scheme_of(f32), members((H, H), (32, H), (32, H))
    return {"x": torch.randn(T, H), **{name: [m[name] for m in made] for name in made[0]}, **scheme.attributes()}


def mlp() -> Arguments:
    scheme = scheme_of(f32)
    made = dict(zip(("gate", "up", "down"), members((I, H), (I, H), (H, I)), strict=True))
    dtypes = {"proj_dtype": f32, "hidden_dtype": f32, "activation": "silu", **scheme.attributes()}
    return {"x": torch.randn(T, H), **{f"{p}_{n}": v for p, m in made.items() for n, v in m.items()}, **dtypes}


CASES = {"linear": (lora_linear, linear), "group": (lora_group, group), "mlp": (lora_mlp, mlp)}


class Both:
    """Calls an op on quantized weights, and on the same weights dequantized."""

    def __init__(self, op: SemanticOp, arguments: Arguments) -> None:
        torch.manual_seed(0)
        self.op, given = op, complete(op, arguments)
        self.derived: list[tuple[DerivedArgument, list[Any]]] = []
        self.plain, self.quantized = dict(given), dict(given)
        for name in op.policy.reads_quantized:
            many = isinstance(given[name], list)
            for member, weight in enumerate(given[name] if many else [given[name]]):
                code = encoding(*weight.shape, nested=member != 1)
                argument = DerivedArgument(name, member if many else None, dequantize_4bit, quantized=True)
                self.derived.append((argument, code))
                self._put(name, argument.member, dequantize_4bit.target(*code))
        for value in self.plain.values():
            for t in value if isinstance(value, list) else [value]:
                if isinstance(t, torch.Tensor) and not any(t is w for w in self.weights()):
                    t.requires_grad_()

    def _put(self, name: str, member: int | None, weight: torch.Tensor) -> None:
        for given, value in ((self.plain, weight), (self.quantized, None)):
            given[name] = value if member is None else [*given[name][:member], value, *given[name][member + 1 :]]

    def weights(self) -> list[torch.Tensor]:
        return [w for name in self.op.policy.reads_quantized for w in _list(self.plain[name])]

    def results(self, quantized: bool) -> list[torch.Tensor]:
        """Return outputs, and the gradients of all tensors that have one."""
        if quantized:
            site, given = call_site(self.op, self.op.order(self.quantized), self.derived)
            results = site(*given)
        else:
            results = call_directly(self.op, self.plain)
        outputs = _list(results[0])
        leaves = [t for v in self.plain.values() for t in _list(v) if isinstance(t, torch.Tensor) and t.requires_grad]
        generator = torch.Generator().manual_seed(1)
        incoming = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
        return [*outputs, *torch.autograd.grad(outputs, leaves, incoming)]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@pytest.mark.parametrize("spares", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_results_equal_those_on_dequantized_weights(case: str, spares: bool) -> None:
    both = Both(CASES[case][0], CASES[case][1]())
    expected = both.results(quantized=False)
    if spares:
        with recomputing():
            found = both.results(quantized=True)
    else:
        found = both.results(quantized=True)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_no_dequantized_weight_is_saved(case: str) -> None:
    both = Both(CASES[case][0], CASES[case][1]())
    kept: list[torch.Tensor] = []

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        both.results(quantized=True)
    shapes = {w.shape for w in both.weights()}
    assert not any(t.shape in shapes for t in kept if t.is_floating_point())
    assert sum(t.dtype is torch.uint8 for t in kept) >= len(both.weights())


@pytest.mark.parametrize("case", CASES)
def test_dispatch_modes_see_dequantized_weights(case: str) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    both = Both(CASES[case][0], CASES[case][1]())
    expected = both.results(quantized=False)
    with FlopCounterMode(display=False):
        found = both.results(quantized=True)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_quantized_arguments_of_unsuitable_ops_raise() -> None:
    with pytest.raises(ValueError, match="glu does not read 'gate' quantized"):
        call_site(glu, [None] * 4, [(DerivedArgument("gate", None, dequantize_4bit, quantized=True), [])])
