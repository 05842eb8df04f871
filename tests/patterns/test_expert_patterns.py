"""Graphs of LoRA on experts' parameters, as in PEFT and transformers, are fused, look-alikes are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import Lookalike, Outcome, analyse, assert_as_exact, bf16, f32, randn
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from fastlora.graph.view import View

EXPERTS, N, K, TOKENS = 3, 24, 16, 12
ENDS = torch.tensor([5, 5, 12], dtype=torch.int32)
"""The second expert has no tokens."""
X = randn(TOKENS, K)
BIAS = randn(TOKENS, N, seed=7, grad=False)

LAYOUTS = pytest.mark.parametrize("out_first", [True, False], ids=["out first", "in first"])


def layer(out_first: bool = True, rank: int = 2, dtype: torch.dtype = f32, adapter: torch.dtype = f32) -> list[Tensor]:
    """Return the weights, A and B of all experts, in PEFT's layouts."""
    shape = (EXPERTS, N, K) if out_first else (EXPERTS, K, N)
    a, b = randn(EXPERTS * rank, K, seed=1, scale=0.3), randn(N, rank * EXPERTS, seed=2, scale=0.3)
    factors = [t.detach().to(adapter).requires_grad_() for t in (a, b)]
    return [randn(*shape, grad=False, scale=0.3).to(dtype), *factors]


def factors(w: Tensor, a: Tensor, b: Tensor, out_first: bool = True) -> tuple[Tensor, Tensor]:
    a = a.reshape(EXPERTS, -1, a.shape[-1])
    b = b.reshape(b.shape[0], -1, EXPERTS).permute(2, 0, 1)
    left, right = (b, a) if out_first else (a.transpose(-2, -1), b.transpose(-2, -1))
    return left.to(w.dtype), right.to(w.dtype)


def summed(w: Tensor, a: Tensor, b: Tensor, scaling: float = 2.0, out_first: bool = True) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return torch.baddbmm(w, *factors(w, a, b, out_first), alpha=scaling)


def product(x: Tensor, matrices: Tensor, ends: Tensor, out_first: bool = True) -> Tensor:
    """Compute the product like transformers; `F.grouped_mm` does not support float64."""
    from transformers.integrations.moe import _grouped_mm

    matrices = matrices.transpose(-2, -1) if out_first else matrices
    if x.dtype is torch.float64:
        return torch.ops.transformers.grouped_mm_fallback(x, matrices, offs=ends)
    return _grouped_mm(x, matrices, ends)


def experts(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor, **how: Any) -> Tensor:
    scaling = how.pop("scaling", 2.0)
    return product(x, summed(w, a, b, scaling, **how), ends, **how)


def assert_fused(outcome: Outcome, tolerance: float = 2e-6) -> None:
    assert outcome.ops == ["lora_experts"], outcome.turned_down()
    assert not outcome.misses
    assert not {"baddbmm", "_grouped_mm", "grouped_mm_fallback"} & set(outcome.targets())
    outcome.assert_tidy()
    outcome.assert_close(tolerance)


@LAYOUTS
@pytest.mark.parametrize("scaling", [1.0, 2.0, 1.5])
@pytest.mark.parametrize(("dtype", "adapter"), [(f32, f32), (bf16, bf16), (bf16, f32)], ids=str)
def test_experts_with_lora_are_one_op(
    dtype: torch.dtype, adapter: torch.dtype, scaling: float, out_first: bool
) -> None:
    inputs = [X.detach().to(dtype).requires_grad_(), *layer(out_first, dtype=dtype, adapter=adapter), ENDS]
    function = lambda *given: experts(*given, scaling=scaling, out_first=out_first)  # noqa: E731
    outcome = analyse(function, *inputs, verify=True)
    assert_fused(outcome, 2e-6 if dtype == f32 else 2e-2)
    assert_as_exact(outcome, function, inputs)


@LAYOUTS
@pytest.mark.parametrize("ambient", [True, False], ids=["ambient", "in the graph"])
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_autocast_is_supported(dtype: torch.dtype, ambient: bool, out_first: bool) -> None:
    """PEFT disables it for the sum, and grouped products ignore it."""

    def function(*given: Any) -> Tensor:
        with torch.autocast("cpu", dtype=bf16):
            return experts(*given, out_first=out_first)

    inputs = [X.detach().to(bf16).requires_grad_(), *layer(out_first, dtype=dtype), ENDS]
    if ambient:
        with torch.autocast("cpu", dtype=bf16):
            outcome = analyse(lambda *given: experts(*given, out_first=out_first), *inputs, verify=True)
    else:
        outcome = analyse(function, *inputs, verify=True)
    assert outcome.eager.outputs[0].dtype == dtype
    assert_fused(outcome, 4e-3 if dtype == f32 else 2e-2)  # x's own gradient is rounded to bfloat16


@pytest.mark.parametrize("trained", ["a", "b", "x", "a b", "x a b", "w", "x w a b"])
@LAYOUTS
def test_any_subset_of_tensors_may_be_trained(trained: str, out_first: bool) -> None:
    tensors = dict(zip(("x", "w", "a", "b"), (X, *layer(out_first)), strict=True))
    inputs = [t.detach().requires_grad_(name in trained.split()) for name, t in tensors.items()]
    assert_fused(analyse(lambda *given: experts(*given, out_first=out_first), *inputs, ENDS))


@LAYOUTS
def test_a_bias_may_be_added_to_the_result_in_place(out_first: bool) -> None:
    def function(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor, bias: Tensor) -> Tensor:
        out = experts(x, w, a, b, ends, out_first=out_first)
        out.add_(bias)
        return out.tanh() * out

    assert_fused(analyse(function, X, *layer(out_first), ENDS, BIAS))


def test_tokens_of_experts_on_other_devices_are_masked() -> None:
    """They come last, are in no group, and are masked before and after the product."""
    ends = torch.tensor([2, 5, 8], dtype=torch.int32)

    def function(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor, mask: Tensor) -> Tensor:
        total, chosen = summed(w, a, b), x[torch.arange(TOKENS)]
        chosen.masked_fill_(mask, 0.0)
        out = product(chosen, total, ends)
        return out.masked_fill(mask, 0.0).tanh()

    mask = (torch.arange(TOKENS) >= 8)[:, None]
    assert_fused(analyse(function, X, *layer(), ends, mask))


@pytest.mark.parametrize("overload", [False, True], ids=["operator", "overload"])
def test_rows_of_no_group_are_zero_if_the_product_zeroes_them(overload: bool) -> None:
    """Without masks."""
    import transformers.integrations.moe  # noqa: F401  (which registers the operator)

    ends = torch.tensor([2, 5, 8], dtype=torch.int32)
    operator = torch.ops.transformers.grouped_mm_fallback
    operator = operator.default if overload else operator

    def function(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        return operator(x, summed(w, a, b).mT, offs=ends)

    outcome = analyse(function, X, *layer(), ends)
    assert outcome.chosen[0].arguments["zero_rest"] is True
    assert_fused(outcome)
    assert not outcome.rewritten.outputs[0][8:].any()


def test_two_parameters_of_one_layer_are_two_ops() -> None:
    up, down = layer(), [t.detach().requires_grad_(t.requires_grad) for t in layer(out_first=False)]

    def function(x: Tensor, ends: Tensor, *both: Tensor) -> Tensor:
        second, first = summed(*both[3:], out_first=True), summed(*both[:3])
        return product(F.silu(product(x, first, ends)), second, ends)

    down[0] = down[0].detach().contiguous()
    down = [down[0], randn(EXPERTS * 2, N, seed=3, scale=0.3), randn(K, 2 * EXPERTS, seed=4, scale=0.3)]
    outcome = analyse(function, X, ENDS, *up, *down)
    assert outcome.ops == ["lora_experts"] * 2
    assert not outcome.misses
    outcome.assert_close(2e-6)


def test_a_dynamic_number_of_tokens_is_supported() -> None:
    x = randn(TOKENS, K)
    torch._dynamo.mark_dynamic(x, 0)
    assert_fused(analyse(experts, x, *layer(), ENDS, dynamic=None))


def test_a_checkpointed_layer_is_rewritten() -> None:
    def function(*given: Tensor) -> Tensor:
        return checkpoint(experts, *given, use_reentrant=False)

    assert_fused(analyse(function, X, *layer(), ENDS))


# ---- what only looks like it

W, A, B = layer()
GIVEN = (X, W, A, B, ENDS)


def read_twice(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    total = summed(w, a, b)
    return product(x, total, ends) + product(x * 2, total, ends)


def leaving(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    total = summed(w, a, b)
    return product(x, total, ends), total


def alone(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return summed(w, a, b)


def doubled(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return product(x, torch.baddbmm(w, *factors(w, a, b), beta=2.0), ends)


def penalised(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return summed(w, a, b).square().sum()


def computed(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return product(x, summed(w.tanh(), a, b), ends)


def for_each_token(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    ids = torch.arange(TOKENS) % EXPERTS
    return torch.bmm(summed(w, a, b)[ids], x.unsqueeze(-1)).squeeze(-1)


def for_each_token_in_first(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    ids = torch.arange(TOKENS) % EXPERTS
    return torch.bmm(x.unsqueeze(1), summed(w, a, b).mT[ids]).squeeze(1)


def one_by_one(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    total = summed(w, a, b)
    return torch.cat([F.linear(part, total[e]) for e, part in enumerate(x.chunk(EXPERTS))])


def two_adapters(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    a, b = a.reshape(EXPERTS, -1, K), b.reshape(N, -1, EXPERTS)
    deltas = [torch.einsum("o r e, e r i -> e o i", b * s, a) * 2.0 for s in (1.0, 0.5)]
    return product(x, w + (deltas[0] + deltas[1]).to(w.dtype), ends)


def written_before(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    total = summed(w, a, b)
    total.mul_(0.5)
    return product(x, total, ends)


def weight_that_changes(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """The weight is written to after the sum and before the product."""
    total = summed(w, a, b)
    w.mul_(0.5)
    return product(x, total, ends)


def of_another_mode(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    with torch.no_grad():
        total = summed(w, a, b)
    return product(x, total, ends)


def under_autocast(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """The sum is rounded to bfloat16, but not the parameter."""
    with torch.autocast("cpu", dtype=bf16):
        total = torch.baddbmm(w, *factors(w, a, b), alpha=2.0)
    return product(x, total, ends)


def broadcast(x: Tensor, w: Tensor, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    return product(x, summed(w, a, b), ends)


def scores(bias: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Attention scores with a bias per head and key."""
    q, k = F.linear(x, w).chunk(2, -1)
    return bias.baddbmm(q, k.transpose(1, 2), beta=1.0, alpha=0.25).softmax(-1)


def mixed(residual: Tensor, x: Tensor, w: Tensor, out: Tensor) -> Tensor:
    return residual + torch.einsum("bsh,hm->bsm", F.linear(x, w), out)


@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (scores, (randn(EXPERTS, 1, TOKENS), randn(EXPERTS, TOKENS, K), randn(8, K))),
        (scores, (randn(EXPERTS, TOKENS, TOKENS), randn(EXPERTS, TOKENS, K), randn(8, K))),
        (mixed, (randn(EXPERTS, TOKENS, 8), randn(EXPERTS, TOKENS, K), randn(16, K), randn(16, 8))),
    ],
)
def test_attention_is_not_a_candidate(function: Any, inputs: Any) -> None:
    outcome = analyse(function, *inputs)
    assert not [miss for miss in outcome.misses if miss.op == "lora"]
    outcome.assert_identical()


HIGH = layer(rank=K)
LOOKALIKES = [
    Lookalike("the sum is read twice", read_twice, GIVEN, missed="value total is also used"),
    Lookalike("the sum is also an output", leaving, GIVEN, missed="leaves the graph"),
    Lookalike("the sum is the only output", alone, GIVEN, missed="leaves the graph before a product reads it"),
    Lookalike("twice the weight", doubled, GIVEN, missed="baddbmm has beta=2.0, which the pattern does not mention"),
    Lookalike("another reader", penalised, GIVEN, missed="reads the sum of weight and adapter"),
    Lookalike("no parameter", computed, GIVEN),
    Lookalike("a matrix for each token", for_each_token, GIVEN, missed="set_experts_implementation('grouped_mm')"),
    Lookalike("the same in first", for_each_token_in_first, GIVEN, missed="set_experts_implementation('grouped_mm')"),
    Lookalike("one by one", one_by_one, GIVEN, missed="set_experts_implementation('grouped_mm')"),
    Lookalike("two adapters", two_adapters, GIVEN, missed="several adapters are active on one parameter"),
    Lookalike("a sum that changes", written_before, GIVEN, missed="value total is also used by mul_"),
    Lookalike("a weight that changes", weight_that_changes, GIVEN, missed="mul_ writes to the input"),
    Lookalike("a sum without gradients", of_another_mode, GIVEN, missed="different gradient or autocast modes"),
    Lookalike("a sum under autocast", under_autocast, GIVEN, missed="its operands differ in dtype"),
    Lookalike("one weight for all", broadcast, (X, W[:1], A, B, ENDS)),
    Lookalike("a high rank", experts, (X, *HIGH, ENDS)),
]


@pytest.mark.parametrize("case", LOOKALIKES, ids=str)
def test_lookalikes_are_not_fused(case: Lookalike) -> None:
    case.check()


@pytest.mark.parametrize(
    ("options", "known"),
    [
        ({"offs": ENDS}, True),
        ({"offs": ENDS, "bias": None, "out_dtype": None}, True),
        ({}, False),
        ({"offs": ENDS, "bias": BIAS}, False),
        ({"offs": ENDS, "out_dtype": f32}, False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_unsupported_grouped_products_are_opaque(options: dict[str, Any], known: bool) -> None:
    graph = fx.Graph()

    def given(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        node = graph.placeholder(name)
        node.meta["example_value"] = value
        return node

    rows, matrices = given("rows", X.detach()), given("matrices", W.mT)
    node = graph.call_function(torch._grouped_mm, (rows, matrices), {n: given(n, v) for n, v in options.items()})
    graph.output(node)
    term = View(graph).term(node)
    assert (term is not None) == known
    assert term is None or term.args["offs"].name == "offs"
