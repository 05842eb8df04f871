"""Errors about mistakes around a pattern (anchors, attributes, conditions, groups) name the value and the remedy."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable

import pytest
from rule_errors import GLU, assert_rule_error

import fastlora
from fastlora.kernels import ops
from fastlora.match.dsl import Op, Scalar, cast, either, silu, tanh
from fastlora.match.rule import dtype_of, fuse, group, rule, tag_of


def _unknown_anchor():
    @rule(ops.glu, anchor="sliu", attrs=GLU)
    def bad(gate, up):
        return silu(gate) * up


def _anchor_not_in_the_pattern():
    @rule(ops.glu, anchor="gelu", attrs=GLU)
    def bad(gate, up):
        return silu(gate) * up


def _anchor_with_one_parameter():
    def anchor(node):
        return True

    @rule(ops.glu, anchor=anchor, attrs=GLU)
    def bad(gate, up):
        return silu(gate) * up


def _invalid_choice():
    @rule(ops.glu, attrs={**GLU, "activation": "swoosh"})
    def bad(gate, up):
        return silu(gate) * up


def _misspelled_choice():
    attrs = {"layout": "halves", "rotary_dim": 8, "compute_dtype": dtype_of(), "out_dtype": dtype_of()}

    @rule(ops.rotary, attrs=attrs)
    def bad(x, cos, sin):
        return x * cos + tanh(x) * sin


def _text_for_a_number():
    @rule(ops.lora_add, attrs={"scaling": "mean", "lora_dtype": dtype_of(), "out_dtype": dtype_of()})
    def bad(base, x, lora_a, lora_b):
        return base + x * lora_a * lora_b


def _number_for_a_tensor():
    @rule(ops.glu, attrs={**GLU, "up": 1.0})
    def bad(gate):
        return silu(gate) * 1.0


def _alternative_that_is_no_choice():
    @rule(ops.glu, attrs={**GLU, "activation": tag_of("act")})
    def bad(gate, up):
        return either(silu=silu(gate), tanh=tanh(gate)).named("act") * up


def _tag_of_a_cast():
    @rule(ops.glu, attrs={**GLU, "activation": lambda match: match.tag("act")})
    def bad(gate, up):
        return cast(either(silu=silu(gate), gelu=Op("gelu", input=gate))).named("act") * up


def _dtype_of_an_unknown_name():
    @rule(ops.glu, attrs={**GLU, "out_dtype": dtype_of("prodcut")})
    def bad(gate, up):
        return cast((silu(gate) * up).named("product"))


def _dtype_of_a_number():
    @rule(ops.glu, attrs={**GLU, "out_dtype": dtype_of("_s")})
    def bad(gate, up, _s: Scalar):
        return silu(gate) * up * _s


def _dtype_for_text():
    @rule(ops.glu, attrs={**GLU, "activation": dtype_of()})
    def bad(gate, up):
        return silu(gate) * up


def _dtype_of_not_called():
    @rule(ops.glu, attrs={**GLU, "out_dtype": dtype_of})
    def bad(gate, up):
        return silu(gate) * up


def _captured_and_in_attrs():
    @rule(ops.glu, attrs={**GLU, "up": lambda match: match.root})
    def bad(gate, up):
        return silu(gate) * up


def _rule_without_an_op():
    @rule
    def bad(gate, up):
        return silu(gate) * up


def _fuse_without_an_op():
    @fuse
    def bad(gate, up):
        return silu(gate) * up


def _group_without_an_op():
    @group
    def bad(matches):
        return True


def _name_for_an_op():
    @rule("glu")
    def bad(gate, up):
        return silu(gate) * up


def _benefit():
    @rule(ops.glu, attrs=GLU, benefit="high")
    def bad(gate, up):
        return silu(gate) * up


def _condition_with_two_parameters():
    @rule(ops.glu, attrs=GLU)
    def good(gate, up):
        return silu(gate) * up

    @good.where
    def bad(match, view):
        return True


def _condition_on_an_unbound_name():
    @rule(ops.glu, attrs=GLU)
    def good(gate, up):
        return silu(gate) * up

    @good.where
    def bad(match):
        return match.tensor("gtae").dim() == 2


def _explanation_with_one_parameter():
    @rule(ops.glu, attrs=GLU)
    def good(gate, up):
        return silu(gate) * up

    @good.otherwise
    def bad(view):
        return None


def _group_by_an_unknown_argument():
    @group(ops.lora_linear, by="y", into=ops.lora_group)
    def bad(matches):
        return True


def _group_by_an_argument_that_is_not_shared():
    @group(ops.lora_linear, by="lora_a", into=ops.lora_group)
    def bad(matches):
        return True


MESSAGES: dict[Callable[[], None], str] = {
    _unknown_anchor: "anchor='sliu': 'sliu' is not an operation: did you mean 'silu'?",
    _anchor_not_in_the_pattern: "anchor='gelu' does not occur in the pattern, whose operations are mul, silu",
    _anchor_with_one_parameter: "the anchor anchor does not take a view and a node",
    _invalid_choice: "attrs activation='swoosh' is not a valid activation of glu: Known: gelu, gelu_tanh, silu",
    _misspelled_choice: "attrs layout='halves' is not a valid layout of rotary: did you mean 'half'? Known: flipped, ",
    _text_for_a_number: "attrs scaling='mean': lora_add(Tensor base",
    _number_for_a_tensor: "not a constant: capture it",
    _alternative_that_is_no_choice: "the alternative tanh of 'act': attrs activation='tanh' is not a valid activation",
    _tag_of_a_cast: "attrs 'activation': 'act' names another pattern, not an either",
    _dtype_of_an_unknown_name: "attrs 'out_dtype': nothing is captured or named 'prodcut': did you mean 'product'?",
    _dtype_of_a_number: "attrs 'out_dtype': '_s' is not a tensor and has no dtype",
    _dtype_for_text: "attrs 'activation' is str in glu(",
    _dtype_of_not_called: "attrs 'out_dtype': call dtype_of, as in dtype_of('name')",
    _captured_and_in_attrs: "'up' is both captured and in attrs: call the capture _up, or leave it out of attrs",
    _rule_without_an_op: "@rule needs the op: write @rule(ops.name)",
    _fuse_without_an_op: "@fuse needs the op: write @fuse(ops.name)",
    _group_without_an_op: "@group needs the op: write @group(ops.member, by='x', into=ops.together)",
    _name_for_an_op: "@rule takes an op of fastlora.kernels.ops as op, not 'glu'; did you mean 'ops.glu'?",
    _benefit: "benefit='high' is not an integer",
    _condition_with_two_parameters: "'bad' is not a function of the match",
    _condition_on_an_unbound_name: "nothing is captured or named 'gtae': did you mean 'gate'? Known: gate, up",
    _explanation_with_one_parameter: "'bad' is not a function of the view and a node",
    _group_by_an_unknown_argument: "lora_group takes ['y'], which lora_linear does not have",
    _group_by_an_argument_that_is_not_shared: "by='lora_a' is not an argument that all members of lora_group share",
}


@pytest.mark.parametrize("define", MESSAGES, ids=lambda define: define.__name__.strip("_"))
def test_errors_name_the_mistake_and_the_remedy(define: Callable[[], None]) -> None:
    assert_rule_error(define, MESSAGES[define])


def test_errors_of_decorated_objects_name_the_decorators_line() -> None:
    with pytest.raises(fastlora.RuleError, match=re.escape("@rule decorates a function, not 3")) as error:
        rule(ops.glu)(3)  # type: ignore[arg-type]
    line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    assert str(error.value).startswith(f"{__file__}:{line}: ")
