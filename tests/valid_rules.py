"""Valid rules in several styles, with methods to mutate one thing at a time."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastlora.graph.canonical_ops import spell
from fastlora.kernels import ops
from fastlora.match.dsl import (
    Constant,
    Opt,
    Param,
    Scalar,
    cast,
    cat,
    dropout,
    either,
    first_half,
    gelu,
    kept,
    linear,
    mean,
    raised,
    rsqrt,
    second_half,
    silu,
    widened,
)
from fastlora.match.pattern import Op
from fastlora.match.pattern_lint import subpatterns
from fastlora.match.rule import Rule, dtype_of, fuse, group, rule, tag_of


def _own_swish(x: Any, beta: float = 1.0) -> Any:
    return x * torch.sigmoid(beta * x)


spell("own_swish", "input beta=1.0", _own_swish)


@dataclass(frozen=True)
class RuleSource:
    """The source of a rule: the decorator with its arguments, and the decorated function."""

    decorator: Callable[..., Any]
    given: tuple[Any, ...]
    options: dict[str, Any]
    function: Callable[..., Any]

    def define(self) -> Any:
        return self.decorator(*self.given, **self.options)(self.function)

    def with_option(self, name: str, value: Any) -> RuleSource:
        return replace(self, options={**self.options, name: value})

    def with_attribute(self, name: str, value: Any) -> RuleSource:
        return self.with_option("attrs", {**self.options.get("attrs", {}), name: value})

    def returning(self, change: Callable[[Any], Any]) -> RuleSource:
        """Return a copy whose function's result is changed."""

        @functools.wraps(self.function)
        def changed(*args: Any, **captures: Any) -> Any:
            return change(self.function(*args, **captures))

        return replace(self, function=changed)

    def taking(self, parameters: list[inspect.Parameter], calls: Callable[[dict[str, Any]], Any]) -> RuleSource:
        """Return a copy whose function takes other parameters; `calls` calls the original with these."""

        @functools.wraps(self.function)
        def changed(**captures: Any) -> Any:
            return calls(captures)

        changed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return replace(self, function=changed)

    def parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function, eval_str=True).parameters.values())

    def tree(self) -> list[Any]:
        """Return the parts of its pattern in a fixed order."""
        made = self.define()
        return subpatterns(made.outputs[0]) if isinstance(made, Rule) else []

    def with_part(self, position: int, change: Callable[[Any], None]) -> RuleSource:
        """Return a copy with one part of its pattern changed."""

        def changed(returned: Any) -> Any:
            first = returned[0] if isinstance(returned, tuple) else returned
            change(subpatterns(first)[position])
            return returned

        return self.returning(changed)


VALID_RULES: list[RuleSource] = []


def valid_rule(decorator: Callable[..., Any], *given: Any, **options: Any) -> Callable[[Any], Any]:
    def keep(function: Any) -> Any:
        VALID_RULES.append(RuleSource(decorator, given, options, function))
        return function

    return keep


@valid_rule(rule, ops.glu, anchor="silu", attrs={"activation": "silu", "out_dtype": dtype_of()})
def swiglu(gate, up):
    return silu(gate) * up


@valid_rule(rule, ops.glu, anchor="own_swish", attrs={"activation": "silu", "out_dtype": dtype_of()}, benefit=3)
def own_swiglu(gate, up):
    return cast(Op("own_swish", input=gate) * up)


@valid_rule(
    rule, ops.glu, anchor=lambda view, node: True, attrs={"activation": tag_of("act"), "out_dtype": dtype_of("all")}
)
def tagged(gate, up):
    g = widened(gate)
    act = either(silu=silu(g), gelu=gelu(g)).named("act")
    return cast(act * widened(up)).named("all")


@valid_rule(
    rule,
    ops.rms_norm,
    anchor="rsqrt",
    attrs={
        "offset": lambda match: 1.0 if match.tag("scale") == "distance" else 0.0,
        "compute_dtype": dtype_of("power"),
        "norm_dtype": lambda match: match.dtype("n"),
        "scale_dtype": dtype_of("scale", torch.float32),
        "out_dtype": dtype_of(),
    },
)
def written_out(x, weight: Opt[Param(1)], eps: Scalar = 1e-6):
    h = widened(x)
    power = mean(h**2).named("power") + eps
    n = cast(h * rsqrt(power)).named("n")
    return cast(n * either(distance=1.0 + widened(weight), plain=cast(weight)).named("scale"))


@valid_rule(rule, ops.layer_norm, anchor="layer_norm", attrs={"out_dtype": dtype_of("x")})
def called(x, weight: Opt, bias: Opt, eps: Scalar, _shape: Constant):
    return Op("layer_norm", input=x, normalized_shape=_shape, weight=weight, bias=bias, eps=eps)


@valid_rule(
    rule,
    ops.rotary,
    attrs={"layout": tag_of("layout"), "rotary_dim": 8, "compute_dtype": torch.float32, "out_dtype": dtype_of()},
)
def rotated(x, cos, sin):
    rotated_x = either(half=cat(-second_half(x), first_half(x)), flipped=cat(second_half(x), -first_half(x)))
    return x * cos + rotated_x.named("layout") * sin


@valid_rule(
    rule,
    ops.linear_cross_entropy,
    anchor="cross_entropy",
    attrs={
        "scale": 1.0,
        "softcap": 0.0,
        "z_loss": 0.0,
        "reduction": "mean",
        "base_dtype": dtype_of("logits"),
        "logits_dtype": dtype_of(),
    },
)
def loss(x, weight: Param(2), bias: Opt[Param(1)], labels, ignore_index: Constant, label_smoothing: Constant = 0.0):
    return Op(
        "cross_entropy",
        input=linear(x, weight, bias).named("logits"),
        target=labels,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
    )


@valid_rule(
    rule,
    ops.lora_linear,
    attrs={"base_dtype": dtype_of("base"), "lora_dtype": dtype_of("inner"), "out_dtype": dtype_of()},
    benefit=2,
)
def adapted(
    x, weight: Param(2), bias: Opt[Param(1)], lora_a: Param(2), lora_b: Param(2), _p: Scalar, scaling: Scalar = 1.0
):
    read = either(dropped=kept("x_dropped", dropout(cast(x), _p)), plain=cast(x))
    low = linear(linear(read, lora_a).named("inner"), lora_b)
    return linear(x, weight, bias).named("base") + either(scaled=low * scaling, plain=low)


@valid_rule(fuse, ops.add_rms_norm)
def after_a_sum(residual, x):
    total = residual + x
    return raised(ops.rms_norm, x=total), total


@valid_rule(fuse, ops.lora_mlp, benefit=3, attrs={"out_dtype": dtype_of("x")})
def mlp(x, base_dtype: Constant, lora_dtype: Constant, proj_dtype: Constant, hidden_dtype: Constant):
    common = {"base_dtype": base_dtype, "lora_dtype": lora_dtype, "x_dropped": None, "seed": None, "dropout": None}
    gate = raised(ops.lora_linear, "gate_", x=x, out_dtype=proj_dtype, **common)
    up = raised(ops.lora_linear, "up_", x=x, out_dtype=proj_dtype, **common)
    product = raised(ops.glu, gate=gate, up=up, out_dtype=hidden_dtype)
    return raised(ops.lora_linear, "down_", x=product, out_dtype=lambda dtype: True, **common)


@valid_rule(group, ops.lora_linear, by="x", into=ops.lora_group)
def shared(matches):
    return len(matches) < 8


@valid_rule(group, ops.rotary, by="cos", into=ops.rotary_group, benefit=2)
def rotated_together(matches):
    return True
