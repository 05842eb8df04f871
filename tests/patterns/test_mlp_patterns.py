"""Graphs of gated units as in models, and of MLPs with LoRA on all three layers, are fused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import Function, analyse, assert_as_exact, bf16, f32, lora, randn
from torch import Tensor


def llama(gate, up):
    return F.silu(gate) * up


def phi3(gate, up):
    gate, up = torch.cat((gate, up), dim=-1).chunk(2, dim=-1)
    return up * F.silu(gate)


def gemma(gate, up):
    return F.gelu(gate, approximate="tanh") * up


def t5(gate, up):
    return torch.mul(F.gelu(gate), up)


def olmo_in_float(gate, up):
    return (F.silu(gate.float()) * up.float()).to(gate.dtype)


SPELLINGS: list[tuple[Function, str]] = [
    (llama, "silu"),
    (phi3, "silu"),
    (gemma, "gelu_tanh"),
    (t5, "gelu"),
    (olmo_in_float, "silu"),
]


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
@pytest.mark.parametrize(("function", "activation"), SPELLINGS, ids=lambda value: getattr(value, "__name__", ""))
def test_every_spelling_of_a_gated_unit_is_one_op(function: Function, activation: str, dtype: torch.dtype) -> None:
    inputs = [randn(2, 3, 16, dtype=dtype), randn(2, 3, 16, seed=1, dtype=dtype)]
    outcome = analyse(function, *inputs)
    assert outcome.ops == ["glu"]
    assert not outcome.misses
    assert outcome.chosen[0].arguments["activation"] == activation
    outcome.assert_tidy()
    assert_as_exact(outcome, function, inputs)
    if dtype == f32:
        outcome.assert_close()


def test_a_value_that_gates_itself_gets_both_gradients() -> None:
    outcome = analyse(lambda x: F.silu(x) * x, randn(2, 3, 16))
    assert outcome.ops == ["glu"]
    outcome.assert_close()


def test_halves_of_a_fused_projection_are_read_in_place() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        gate, up = F.linear(x, w).chunk(2, dim=-1)
        return up * F.silu(gate)

    outcome = analyse(function, randn(2, 3, 16), randn(48, 16))
    assert outcome.ops == ["glu"]
    outcome.assert_close()


def adapted(seed: int, n: int, k: int, base: torch.dtype = f32, grad: bool = True) -> tuple[Tensor, ...]:
    a, b = (randn(*shape, seed=seed, grad=grad, scale=0.3) for shape in ((4, k), (n, 4)))
    return randn(n, k, seed=seed, grad=False, dtype=base, scale=0.3), a, b


def layers(base: torch.dtype = f32) -> tuple[Tensor, ...]:
    return (*adapted(1, 24, 16, base), *adapted(2, 24, 16, base), *adapted(3, 16, 24, base))


def mlp(x: Tensor, *weights: Tensor, p: float = 0.0) -> Tensor:
    gate, up = lora(x, *weights[:3], p=p), lora(x, *weights[3:6], p=p)
    return lora(F.silu(gate) * up, *weights[6:], p=p)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_a_gated_mlp_with_adapters_is_one_op(dtype: torch.dtype) -> None:
    inputs = [randn(2, 3, 16, dtype=dtype), *layers(dtype)]
    outcome = analyse(mlp, *inputs)
    assert outcome.ops == ["lora_mlp"]
    assert not outcome.misses
    outcome.assert_tidy()
    assert_as_exact(outcome, mlp, inputs)
    if dtype == f32:
        outcome.assert_close(2e-6)


@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_an_mlp_with_dropout_keeps_eagers_masks(dtype: torch.dtype) -> None:
    outcome = analyse(lambda *given: mlp(*given, p=0.3), randn(2, 3, 16, dtype=dtype), *layers(dtype))
    assert outcome.ops == ["glu", "lora_linear", "lora_linear", "lora_linear"]
    outcome.assert_tidy()
    outcome.assert_close(2e-6 if dtype == f32 else 3e-2)


def test_an_mlp_whose_down_layer_has_no_adapter_groups_the_others() -> None:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return F.linear(F.silu(lora(x, *weights[:3])) * lora(x, *weights[3:6]), weights[6])

    outcome = analyse(function, randn(2, 3, 16), *layers()[:7])
    assert outcome.ops == ["glu", "lora_group"]
    outcome.assert_tidy()
    outcome.assert_close(2e-6)


def test_an_mlp_with_different_scalings_keeps_each() -> None:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        gate, up = lora(x, *weights[:3], scaling=0.5), lora(x, *weights[3:6], scaling=3.0)
        return lora(F.gelu(gate) * up, *weights[6:], scaling=7.0)

    outcome = analyse(function, randn(2, 3, 16), *layers())
    assert outcome.ops == ["lora_mlp"]
    arguments = outcome.chosen[0].arguments
    assert [arguments[f"{name}_scaling"] for name in ("gate", "up", "down")] == [0.5, 3.0, 7.0]
    outcome.assert_close(2e-6)


def test_an_mlp_under_autocast_is_one_op() -> None:
    def function(*given: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=bf16):
            return mlp(*given)

    outcome = analyse(function, randn(2, 3, 16), *layers())
    assert outcome.ops == ["lora_mlp"]
    outcome.assert_close(3e-2)


@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (4, 5), (7, 8), (1, 2, 4, 5, 7, 8)], ids=str)
def test_frozen_parts_of_an_mlp_get_no_gradient(frozen: tuple[int, ...]) -> None:
    """Indices of tensors: 0 is x, then weight, A and B of gate, up and down."""
    tensors = (randn(2, 3, 16), *layers())
    positions = {0: 0, 1: 2, 2: 3, 4: 5, 5: 6, 7: 8, 8: 9}
    inputs = [t.detach() if i in {positions[f] for f in frozen} else t for i, t in enumerate(tensors)]
    outcome = analyse(mlp, *inputs)
    assert outcome.ops == ["lora_mlp"]
    outcome.assert_close(2e-6)
