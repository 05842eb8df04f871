"""Errors about mistakes in patterns name the wrong value and the remedy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from rule_errors import GLU, assert_rule_error

from fastlora.kernels import ops
from fastlora.match.dsl import Op, Param, Scalar, cast, either, raised, seeded, silu, tanh
from fastlora.match.rule import dtype_of, fuse, rule


def _unknown_operation():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return Op("slu", input=gate) * up


def _operation_seen_as_another():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return silu(Op("transpose", input=gate, dim0=0, dim1=1)) * up


def _unknown_argument():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return Op("silu", inptu=gate) * up


def _required_argument():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return Op("layer_norm", input=gate) * up


def _power():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return Op("pow", input=gate, exponent=-0.5) * up


def _square():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return Op("mul", input=gate, other=gate) * up


def _function_not_called():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return silu(gate) * up * tanh


def _matrix_product():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return silu(gate @ up)


def _branch_on_a_pattern():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return silu(gate) * up if gate else up


def _nothing_returned():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        silu(gate) * up


def _type_for_a_predicate():
    @rule(ops.glu, attrs=GLU)
    def bad(gate: torch.Tensor, up):
        return silu(gate) * up


def _predicate_not_called():
    @rule(ops.glu, attrs=GLU)
    def bad(gate: Param, up):
        return silu(gate) * up


def _text_for_dimensions():
    @rule(ops.glu, attrs=GLU)
    def bad(gate: Param("2"), up):
        return silu(gate) * up


def _undefined_annotation():
    @rule(ops.glu, attrs=GLU)
    def bad(gate: Parm(2), up):  # type: ignore[name-defined]  # noqa: F821
        return silu(gate) * up


def _variadic_captures():
    @rule(ops.glu, attrs=GLU)
    def bad(*values):
        return silu(values[0]) * values[1]


def _one_alternative():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return either(only=silu(gate)) * up


def _equal_alternatives():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return either(one=silu(gate) * up, other=(up * silu(gate)).named("again"))


def _two_values_with_one_name():
    @rule(ops.glu, attrs={**GLU, "out_dtype": dtype_of("part")})
    def bad(gate, up):
        return silu(gate.named("part")) * cast(up).named("part")


def _value_with_the_name_of_a_capture():
    @rule(ops.glu, attrs={**GLU, "out_dtype": dtype_of("gate")})
    def bad(gate, up):
        return silu(cast(gate).named("gate")) * up


def _override_of_an_unknown_argument():
    @fuse(ops.glu)
    def bad(gate):
        return raised(ops.glu, gaet=gate)


def _raised_argument():
    @fuse(ops.glu)
    def bad(gate):
        lora = raised(ops.lora_linear, "_", x=gate, x_dropped=None, seed=None)
        return raised(ops.glu, gate=gate, up=lora)


def _prefix_used_twice():
    @fuse(ops.lora_mlp)
    def bad(x):
        inner = raised(ops.lora_linear, "gate_", x=x)
        return raised(ops.lora_linear, "gate_", x=inner)


def _raised_at_the_top_of_a_rule():
    @rule(ops.glu)
    def bad(gate, up):
        return raised(ops.glu, gate=gate, up=up)


def _raised_by_name():
    @fuse(ops.glu)
    def bad(gate, up):
        return raised("glu", gate=gate, up=up)


def _dropout_without_a_condition():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up, _p: Scalar):
        return silu(seeded("seed", gate, _p, where=True)) * up


MESSAGES: dict[Callable[[], None], str] = {
    _unknown_operation: "'slu' is not an operation: did you mean 'silu'? Known: add, ",
    _operation_seen_as_another: "patterns never see 'transpose', but transposed, of a matrix, or mT, of a stack",
    _unknown_argument: "silu has no argument 'inptu': did you mean 'input'? Known: input",
    _required_argument: "layer_norm has no default for 'normalized_shape': mention it",
    _power: "patterns never see pow with the exponent -0.5, but rsqrt",
    _square: "patterns never see mul of a value with itself, but square",
    _function_not_called: "tanh is not a predicate on a constant: call it if it makes a pattern",
    _matrix_product: "its function raises TypeError: unsupported operand type(s) for @",
    _branch_on_a_pattern: "its function raises TypeError: a pattern is neither true nor false",
    _nothing_returned: "its function must return a pattern, or a tuple of patterns, and returns None",
    _type_for_a_predicate: "the annotation Tensor of 'gate' is a type, not a predicate: annotate with Param(n)",
    _predicate_not_called: "the annotation Param of 'gate' is a type, not a predicate: annotate with Param(n)",
    _text_for_dimensions: "the annotation Param(dim='2') of 'gate' must say how many dimensions there are",
    _undefined_annotation: "its function raises NameError: name 'Parm' is not defined",
    _variadic_captures: "its parameter *values is not a capture",
    _one_alternative: "either has 1 alternatives: give it two or more, or leave it out",
    _equal_alternatives: "the alternatives one and other are the same pattern, so other is never taken",
    _two_values_with_one_name: "'part' is bound twice in one match: rename one of the two",
    _value_with_the_name_of_a_capture: "'gate' is bound twice in one match",
    _override_of_an_unknown_argument: "glu has no argument 'gaet': did you mean 'gate'? Known: activation, gate, ",
    _raised_argument: "raised(ops.lora_linear, ...) must specify it as a capture, a constant, or a",
    _prefix_used_twice: "is bound twice in one match: rename one of the two, or give a raised op another prefix",
    _raised_at_the_top_of_a_rule: "a raised op is at the top of the pattern, which only @fuse finds",
    _raised_by_name: "raised takes an op of fastlora.kernels.ops, not 'glu'",
    _dropout_without_a_condition: "where=True of seeded 'seed' does not take a view and a value",
}


@pytest.mark.parametrize("define", MESSAGES, ids=lambda define: define.__name__.strip("_"))
def test_errors_name_the_mistake_and_the_remedy(define: Callable[[], None]) -> None:
    assert_rule_error(define, MESSAGES[define])


def test_a_name_may_stand_in_each_alternative() -> None:
    @rule(ops.glu, attrs={**GLU, "out_dtype": dtype_of("part")})
    def good(gate, up):
        return either(one=silu(gate).named("part") * up, other=tanh(gate).named("part") * up)

    assert good.names == {"gate", "up", "part"}


def test_operations_on_several_values_take_lists_and_tuples() -> None:
    @rule(ops.glu, attrs=GLU)
    def good(gate, up):
        return Op("cat", tensors=[silu(gate), up])

    assert good.outputs[0].size() == 2
