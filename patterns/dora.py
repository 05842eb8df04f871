"""DoRA: adapters with a scale per output feature, and the norms from which these scales are computed.

PEFT computes the scale from a magnitude and the norm of each row of W + s B A, for which it applies A and B to an
identity matrix, without gradients. It adds `(scale - 1) * plain + scale * low * s` to the base layer's output, where
`plain` is that output without the bias, or, with dropout, the base layer applied to the dropped-out input.
"""

from __future__ import annotations

from typing import Any

from fastlora.graph.fake_values import known_equal, same_shape
from fastlora.kernels import ops
from fastlora.match.dsl import (
    Opt,
    Param,
    Pattern,
    Scalar,
    cast,
    detach,
    either,
    eye,
    linalg_norm,
    linear,
    transposed,
)
from fastlora.match.rule import GroupRule, Match, Rule, dtype_of, rule
from fastlora.patterns.lora import has_low_rank, low_rank


def _scaled_sum(base: Pattern, plain: Any, low: Pattern, scale: Pattern, scaling: Pattern) -> Pattern:
    adapter = either(scaled=(scale * low) * scaling, plain=scale * low)
    return cast(base + ((scale - 1) * plain + adapter))


@rule(
    ops.dora_linear,
    anchor=low_rank,
    benefit=2,
    attrs={"base_dtype": dtype_of("base"), "lora_dtype": dtype_of("inner"), "out_dtype": dtype_of()},
)
def dora_linear(
    x,
    weight: Param(2),
    bias: Opt[Param(1)],
    lora_a: Param(2),
    lora_b: Param(2),
    scale,
    scaling: Scalar = 1.0,
):
    base = linear(x, weight, bias).named("base")
    plain = either(unbiased=base - bias, same=base).named("plain")
    return _scaled_sum(base, plain, linear(linear(cast(x), lora_a).named("inner"), lora_b), scale, scaling)


@rule(ops.dora_add, anchor=low_rank, benefit=2, attrs={"lora_dtype": dtype_of("inner"), "out_dtype": dtype_of()})
def dora_add(base, plain, x, lora_a: Param(2), lora_b: Param(2), scale, scaling: Scalar = 1.0):
    """DoRA on any base layer, and with dropout, in which case `plain` is computed from the dropped-out input."""
    return _scaled_sum(base, plain, linear(linear(cast(x), lora_a).named("inner"), lora_b), scale, scaling)


def _is_last_of_two(dim: Any) -> bool:
    """Return whether a dimension is the last of two."""
    return dim in (1, -1, (1,), [1], (-1,), [-1])


@rule(
    ops.dora_norm,
    anchor=low_rank,
    benefit=2,
    attrs={"lora_dtype": dtype_of("product"), "sum_dtype": dtype_of("total"), "out_dtype": dtype_of()},
)
def dora_norm(weight, lora_a: Param(2), lora_b: Param(2), scaling: Scalar = 1.0):
    unit = eye(lambda n: True, dtype=lambda dtype: True, device=lambda device: True)
    product = linear(linear(unit, lora_a), lora_b).named("product")
    delta = detach(cast(transposed(product)))
    total = (cast(weight) + either(scaled=delta * scaling, plain=delta)).named("total")
    return detach(cast(linalg_norm(total, dim=_is_last_of_two)))


for _adapter in (dora_linear, dora_add, dora_norm):
    _adapter.where(has_low_rank)


@dora_linear.where
@dora_add.where
def _scale_is_per_feature(match: Match):
    shape, features = match.tensor("scale").shape, match.tensor().shape[-1]
    is_vector = all(known_equal(size, 1) for size in shape[:-1])
    fits = len(shape) > 0 and is_vector and known_equal(shape[-1], features)
    return fits or f"the scale has the shape {tuple(shape)}"


@dora_linear.where
def _bias_is_not_scaled(match: Match):
    expected = "same" if match.value("bias") is None else "unbiased"
    return match.tag("plain") == expected or "the bias is scaled as well"


@dora_add.where
def _base_is_not_broadcast(match: Match):
    same = all(same_shape(match.tensor(name), match.tensor()) for name in ("base", "plain"))
    return same or "the base is broadcast"


@dora_norm.where
def _weight_has_the_shape_of_the_product(match: Match):
    weight, a, b = (match.tensor(name) for name in ("weight", "lora_a", "lora_b"))
    fits = weight.dim() == 2 and known_equal(weight.shape[0], b.shape[0]) and known_equal(weight.shape[1], a.shape[1])
    return fits or f"the weight has the shape {tuple(weight.shape)}"


RULES: list[Rule | GroupRule] = [dora_linear, dora_add, dora_norm]
