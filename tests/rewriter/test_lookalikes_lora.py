"""Graphs that resemble a LoRA adapter stay bit-identical, and reports say why they are not fused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from graphs import WRITES, Lookalike, bf16, lora, randn
from torch import Tensor

X = randn(2, 3, 16)
W = randn(24, 16, grad=False)
A, B = randn(4, 16), randn(24, 4)
LAYER = (X, W, A, B)


def low_rank(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(F.linear(x, a), b)


def escaping_product(x, w, a, b):
    low = low_rank(x, a, b)
    return F.linear(x, w) + low * 2.0, low


def escaping_through_an_identity(x, w, a, b):
    low = low_rank(x, a, b)
    return F.linear(x, w) + low * 2.0, low.contiguous()


def escaping_inner(x, w, a, b):
    inner = F.linear(x, a)
    return F.linear(x, w) + F.linear(inner, b) * 2.0 + inner.sum()


def escaping_base(x, w, a, b):
    base = F.linear(x, w)
    return base + low_rank(x, a, b) * 2.0, base


def mutated_product(x, w, a, b):
    low = low_rank(x, a, b)
    low.add_(1)
    return F.linear(x, w) + low * 2.0


def augmented_product(x, w, a, b):
    low = low_rank(x, a, b)
    low += 1
    return F.linear(x, w) + low * 2.0


def mutated_inner(x, w, a, b):
    inner = F.linear(x, a)
    inner[0] = 0.0
    return F.linear(x, w) + F.linear(inner, b) * 2.0


def mutated_result(x, w, a, b):
    y = lora(x, w, a, b)
    kept = y.view(6, 24)
    y.mul_(2)
    return y, kept


def without_gradients(x, w, a, b):
    base = F.linear(x, w)
    with torch.no_grad():
        low = low_rank(x, a, b) * 2.0
    return base + low


def inner_without_gradients(x, w, a, b):
    with torch.no_grad():
        inner = F.linear(x, a)
    return F.linear(x, w) + F.linear(inner, b) * 2.0


def cast_without_gradients(x, w, a, b):
    with torch.no_grad():
        z = x.float()
    return (F.linear(x, w) + low_rank(z, a, b) * 2.0).to(x.dtype)


def without_gradients_from(copy: Callable[[Tensor], Tensor]):
    def function(x, w, a, b):
        with torch.no_grad():
            z = copy(x)
        return F.linear(x, w) + low_rank(z, a, b) * 2.0

    return function


def another_autocast(x, w, a, b):
    base = F.linear(x, w)
    with torch.autocast("cpu", dtype=bf16):
        low = low_rank(x, a, b)
    return base + low * 2.0


def hooked_product(x, w, a, b):
    low = low_rank(x, a, b)
    low.register_hook(lambda grad: grad * 3)
    return F.linear(x, w) + low * 2.0


def required_base(x, w, a, b):
    base = F.linear(x, w)
    base.requires_grad_()
    return base + low_rank(x, a, b) * 2.0, base


def input_snapshot(x, w, a, b):
    x = x * 1.5
    before = x.clone()
    x.add_(1)
    return F.linear(before, w) + low_rank(x, a, b) * 2.0


BF16_LAYER = (X.detach().to(bf16).requires_grad_(), W.to(bf16), A, B)

LOOKALIKES = [
    Lookalike("the product leaves the graph", escaping_product, LAYER, missed="leaves the graph as an output"),
    Lookalike("the product leaves as contiguous", escaping_through_an_identity, LAYER, missed="leaves the graph"),
    Lookalike("the inner product is used elsewhere", escaping_inner, LAYER, missed="is also used by"),
    Lookalike("the base leaves the graph", escaping_base, LAYER, ("lora_add",), refused="leaves the graph"),
    Lookalike("the product is added to in place", mutated_product, LAYER, missed="add_"),
    Lookalike("the product is augmented", augmented_product, LAYER, missed="lora"),
    Lookalike("the inner product is overwritten", mutated_inner, LAYER, missed="setitem"),
    Lookalike("the adapter has no gradients", without_gradients, LAYER, missed="gradient or autocast modes"),
    Lookalike(
        "half of the adapter has no gradients",
        inner_without_gradients,
        LAYER,
        missed="gradient or autocast modes",
    ),
    Lookalike("the adapter's cast has no gradients", cast_without_gradients, BF16_LAYER),
    Lookalike("the adapter's clone has no gradients", without_gradients_from(lambda x: x.clone()), LAYER),
    Lookalike("the adapter's view has no gradients", without_gradients_from(lambda x: x.view(2, 3, 16)), LAYER),
    Lookalike("the adapter's product by one has no gradients", without_gradients_from(lambda x: x * 1.0), LAYER),
    Lookalike("the adapter computes under autocast", another_autocast, LAYER, missed="gradient or autocast modes"),
    Lookalike("the product has a hook", hooked_product, LAYER, fullgraph=False),
    Lookalike("the base requires a gradient", required_base, (X.detach(), W, A, B), fullgraph=False),
    Lookalike("the base reads a snapshot of the input", input_snapshot, LAYER, ("lora_add",)),
    Lookalike(
        "the adapter reads another input",
        lambda x, w, a, b, z: F.linear(x, w) + low_rank(z, a, b) * 2.0,
        (*LAYER, randn(2, 3, 16, seed=1)),
        missed="reads another input",
    ),
    Lookalike(
        "the adapter's input is detached",
        lambda x, w, a, b: F.linear(x, w) + low_rank(x.detach(), a, b) * 2.0,
        LAYER,
        missed="reads another input",
    ),
    Lookalike(
        "the inner product is detached",
        lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a).detach(), b) * 2.0,
        LAYER,
    ),
    Lookalike(
        "the rank is not low",
        lambda x, w, a, b: F.linear(x, w) + low_rank(x, a, b) * 2.0,
        (X, W, randn(20, 16), randn(24, 20)),
    ),
    Lookalike(
        "up comes before down",
        lambda x, w, a, b: F.linear(x, w) + low_rank(x, b, a) * 2.0,
        (X, W, randn(24, 32), randn(32, 16)),
    ),
    Lookalike(
        "A has a bias",
        lambda x, w, a, b, bias: F.linear(x, w) + F.linear(F.linear(x, a, bias), b) * 2.0,
        (*LAYER, randn(4)),
    ),
    Lookalike(
        "the scaling is a vector",
        lambda x, w, a, b, s: F.linear(x, w) + low_rank(x, a, b) * s,
        (*LAYER, randn(24)),
        missed="is neither a number nor a scalar parameter",
    ),
    Lookalike(
        "the adapter is subtracted",
        lambda x, w, a, b: F.linear(x, w) - low_rank(x, a, b) * 2.0,
        LAYER,
        missed="lora",
    ),
    Lookalike(
        "there is a dropout between A and B",
        lambda x, w, a, b: F.linear(x, w) + F.linear(F.dropout(F.linear(x, a), 0.2), b) * 2.0,
        LAYER,
    ),
    Lookalike(
        "there is a dropout after B",
        lambda x, w, a, b: F.linear(x, w) + F.dropout(low_rank(x, a, b), 0.2) * 2.0,
        LAYER,
        missed="lora",
    ),
    Lookalike(
        "there is an activation between A and B",
        lambda x, w, a, b: F.linear(x, w) + F.linear(F.relu(F.linear(x, a)), b) * 2.0,
        LAYER,
    ),
    Lookalike(
        "the base is broadcast",
        lambda x, w, a, b: F.linear(x, w).mean(1, keepdim=True) + low_rank(x, a, b) * 2.0,
        LAYER,
        missed="broadcast",
    ),
    Lookalike(
        "the base is a number of the graph",
        lambda x, a, b: low_rank(x, a, b) * 2.0 + x.shape[1],
        (X, A, B),
        dynamic=True,
    ),
    Lookalike(
        "B is computed",
        lambda x, w, a, b: F.linear(x, w) + low_rank(x, a, b * 3) * 2.0,
        LAYER,
        missed="is not a parameter",
    ),
    Lookalike(
        "the base weight is computed",
        lambda x, w, a, b: F.linear(x, w * 3) + low_rank(x, a, b) * 2.0,
        LAYER,
        ("lora_add",),
    ),
]


@pytest.mark.parametrize("case", LOOKALIKES, ids=str)
def test_adapter_lookalikes_are_not_fused(case: Lookalike) -> None:
    case.check()


def test_a_fused_output_may_be_written_to_in_place() -> None:
    """A block adds attention to the output of its MLP in place."""
    Lookalike("the result is written in place", mutated_result, LAYER, ("lora_linear",)).check()


@pytest.mark.parametrize("name", WRITES)
def test_an_input_written_between_base_and_adapter_is_not_fused(name: str) -> None:
    """The base reads the old values, the adapter the new ones; fusing the adapter alone is legal."""

    def function(x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x = x * 1.5
        base = F.linear(x, w)
        WRITES[name](x)
        return base + low_rank(x, a, b) * 2.0

    Lookalike(name, function, LAYER, ("lora_add",)).check()
