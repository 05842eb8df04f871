"""What authors read about the mistakes that they make most: the value that is wrong, and what to write instead."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastlora
from fastlora.kernels import ops
from fastlora.match.dsl import Op, Param, Scalar, cast, either, raised, seeded, silu, tanh
from fastlora.match.rule import dtype_of, fuse, group, rule, tag_of

GLU: dict[str, Any] = {"activation": "silu", "out_dtype": dtype_of()}


def _operation():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return Op("slu", input=gate) * up


def _hidden_operation():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return silu(Op("transpose", input=gate, dim0=0, dim1=1)) * up


def _argument():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return Op("silu", inptu=gate) * up


def _mandatory_argument():
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


def _builder_uncalled():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return silu(gate) * up * tanh


def _anchor():
    @rule(ops.glu, anchor="sliu", attrs=GLU)
    def bad(gate, up):
        return silu(gate) * up


def _anchor_elsewhere():
    @rule(ops.glu, anchor="gelu", attrs=GLU)
    def bad(gate, up):
        return silu(gate) * up


def _anchor_of_one():
    def anchor(node):
        return True

    @rule(ops.glu, anchor=anchor, attrs=GLU)
    def bad(gate, up):
        return silu(gate) * up


def _choice():
    @rule(ops.glu, attrs={**GLU, "activation": "swoosh"})
    def bad(gate, up):
        return silu(gate) * up


def _layout():
    attrs = {"layout": "halves", "rotary_dim": 8, "compute_dtype": dtype_of(), "out_dtype": dtype_of()}

    @rule(ops.rotary, attrs=attrs)
    def bad(x, cos, sin):
        return x * cos + tanh(x) * sin


def _number():
    @rule(ops.lora_add, attrs={"scaling": "mean", "lora_dtype": dtype_of(), "out_dtype": dtype_of()})
    def bad(base, x, lora_a, lora_b):
        return base + x * lora_a * lora_b


def _tensor():
    @rule(ops.glu, attrs={**GLU, "up": 1.0})
    def bad(gate):
        return silu(gate) * 1.0


def _choice_of_an_alternative():
    @rule(ops.glu, attrs={**GLU, "activation": tag_of("act")})
    def bad(gate, up):
        return either(silu=silu(gate), tanh=tanh(gate)).named("act") * up


def _tag_behind_a_cast():
    @rule(ops.glu, attrs={**GLU, "activation": lambda match: match.tag("act")})
    def bad(gate, up):
        return cast(either(silu=silu(gate), gelu=Op("gelu", input=gate))).named("act") * up


def _dtype():
    @rule(ops.glu, attrs={**GLU, "out_dtype": dtype_of("prodcut")})
    def bad(gate, up):
        return cast((silu(gate) * up).named("product"))


def _dtype_of_a_number():
    @rule(ops.glu, attrs={**GLU, "out_dtype": dtype_of("_s")})
    def bad(gate, up, _s: Scalar):
        return silu(gate) * up * _s


def _dtype_for_a_word():
    @rule(ops.glu, attrs={**GLU, "activation": dtype_of()})
    def bad(gate, up):
        return silu(gate) * up


def _dtype_uncalled():
    @rule(ops.glu, attrs={**GLU, "out_dtype": dtype_of})
    def bad(gate, up):
        return silu(gate) * up


def _captured_twice():
    @rule(ops.glu, attrs={**GLU, "up": lambda match: match.root})
    def bad(gate, up):
        return silu(gate) * up


def _no_parentheses():
    @rule
    def bad(gate, up):
        return silu(gate) * up


def _no_parentheses_on_a_fusion():
    @fuse
    def bad(gate, up):
        return silu(gate) * up


def _no_parentheses_on_a_group():
    @group
    def bad(matches):
        return True


def _no_op():
    @rule("glu")
    def bad(gate, up):
        return silu(gate) * up


def _benefit():
    @rule(ops.glu, attrs=GLU, benefit="high")
    def bad(gate, up):
        return silu(gate) * up


def _matrix_product():
    @rule(ops.glu, attrs=GLU)
    def bad(gate, up):
        return silu(gate @ up)


def _branch():
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


def _predicate_uncalled():
    @rule(ops.glu, attrs=GLU)
    def bad(gate: Param, up):
        return silu(gate) * up


def _dimensions():
    @rule(ops.glu, attrs=GLU)
    def bad(gate: Param("2"), up):
        return silu(gate) * up


def _annotation_that_is_not_there():
    @rule(ops.glu, attrs=GLU)
    def bad(gate: Parm(2), up):  # type: ignore[name-defined]  # noqa: F821
        return silu(gate) * up


def _any_number_of_captures():
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


def _two_of_a_name():
    @rule(ops.glu, attrs={**GLU, "out_dtype": dtype_of("part")})
    def bad(gate, up):
        return silu(gate.named("part")) * cast(up).named("part")


def _name_of_a_capture():
    @rule(ops.glu, attrs={**GLU, "out_dtype": dtype_of("gate")})
    def bad(gate, up):
        return silu(cast(gate).named("gate")) * up


def _override():
    @fuse(ops.glu)
    def bad(gate):
        return raised(ops.glu, gaet=gate)


def _raised_argument():
    @fuse(ops.glu)
    def bad(gate):
        lora = raised(ops.lora_linear, "_", x=gate, x_dropped=None, seed=None)
        return raised(ops.glu, gate=gate, up=lora)


def _prefix():
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


def _condition():
    @rule(ops.glu, attrs=GLU)
    def good(gate, up):
        return silu(gate) * up

    @good.where
    def bad(match, view):
        return True


def _condition_on_what_is_not_bound():
    @rule(ops.glu, attrs=GLU)
    def good(gate, up):
        return silu(gate) * up

    @good.where
    def bad(match):
        return match.tensor("gtae").dim() == 2


def _explanation():
    @rule(ops.glu, attrs=GLU)
    def good(gate, up):
        return silu(gate) * up

    @good.otherwise
    def bad(view):
        return None


def _group_by():
    @group(ops.lora_linear, by="y", into=ops.lora_group)
    def bad(matches):
        return True


def _group_by_what_each_has():
    @group(ops.lora_linear, by="lora_a", into=ops.lora_group)
    def bad(matches):
        return True


SAID: dict[Callable[[], None], str] = {
    _operation: "'slu' is not an operation: did you mean 'silu'? Known: add, ",
    _hidden_operation: "patterns never see 'transpose', but transposed, of a matrix, or mT, of a stack of them",
    _argument: "silu has no argument 'inptu': did you mean 'input'? Known: input",
    _mandatory_argument: "layer_norm has no default for 'normalized_shape': mention it",
    _power: "patterns never see pow with the exponent -0.5, but rsqrt",
    _square: "patterns never see mul of a value with itself, but square",
    _builder_uncalled: "tanh is not a predicate on a constant: call it if it makes a pattern",
    _anchor: "anchor='sliu': 'sliu' is not an operation: did you mean 'silu'?",
    _anchor_elsewhere: "anchor='gelu' is in no match of the pattern, whose operations are mul, silu",
    _anchor_of_one: "the anchor anchor does not take a view and a node",
    _choice: "attrs activation='swoosh' is not a valid activation of glu: Known: gelu, gelu_tanh, silu",
    _layout: "attrs layout='halves' is not a valid layout of rotary: did you mean 'half'? Known: flipped, half, ",
    _number: "attrs scaling='mean': lora_add(Tensor base",
    _tensor: "which no constant is; capture it",
    _choice_of_an_alternative: "the alternative tanh of 'act': attrs activation='tanh' is not a valid activation",
    _tag_behind_a_cast: "attrs 'activation': 'act' is the name of no either, but of something",
    _dtype: "attrs 'out_dtype': nothing is captured or named 'prodcut': did you mean 'product'? Known: gate, ",
    _dtype_of_a_number: "attrs 'out_dtype': '_s' is not a tensor and has no dtype",
    _dtype_for_a_word: "attrs 'activation' is str in glu(",
    _dtype_uncalled: "attrs 'out_dtype': call dtype_of, as in dtype_of('name')",
    _captured_twice: "'up' is both captured and in attrs: call the capture _up, or leave it out of attrs",
    _no_parentheses: "@rule needs the op: write @rule(ops.name)",
    _no_parentheses_on_a_fusion: "@fuse needs the op: write @fuse(ops.name)",
    _no_parentheses_on_a_group: "@group needs the op: write @group(ops.member, by='x', into=ops.together)",
    _no_op: "@rule takes an op of fastlora.kernels.ops as op, not 'glu'; did you mean 'ops.glu'?",
    _benefit: "benefit='high' is not an integer",
    _matrix_product: "its function raises TypeError: unsupported operand type(s) for @",
    _branch: "its function raises TypeError: a pattern is neither true nor false",
    _nothing_returned: "its function must return a pattern, or a tuple of patterns, and returns None",
    _type_for_a_predicate: "the annotation Tensor of 'gate' is a type, not a predicate: annotate with Param(n)",
    _predicate_uncalled: "the annotation Param of 'gate' is a type, not a predicate: annotate with Param(n)",
    _dimensions: "the annotation Param(dim='2') of 'gate' must say how many dimensions there are",
    _annotation_that_is_not_there: "its function raises NameError: name 'Parm' is not defined",
    _any_number_of_captures: "its parameter *values is not a capture",
    _one_alternative: "either has 1 alternatives: give it two or more, or leave it out",
    _equal_alternatives: "the alternatives one and other are the same pattern, so other is never taken",
    _two_of_a_name: "'part' is bound twice in one match: rename one of the two",
    _name_of_a_capture: "'gate' is bound twice in one match",
    _override: "glu has no argument 'gaet': did you mean 'gate'? Known: activation, gate, out_dtype, up",
    _raised_argument: "raised(ops.lora_linear, ...) must say what it is: a capture, a constant, or a",
    _prefix: "is bound twice in one match: rename one of the two, or give a raised op another prefix",
    _raised_at_the_top_of_a_rule: "a raised op is at the top of the pattern, which only @fuse finds",
    _raised_by_name: "raised takes an op of fastlora.kernels.ops, not 'glu'",
    _dropout_without_a_condition: "where=True of seeded 'seed' does not take a view and a value",
    _condition: "'bad' is not a function of the match",
    _condition_on_what_is_not_bound: "nothing is captured or named 'gtae': did you mean 'gate'? Known: gate, up",
    _explanation: "'bad' is not a function of the view and a node",
    _group_by: "lora_group takes ['y'], which lora_linear does not have",
    _group_by_what_each_has: "by='lora_a' is nothing that all members of lora_group share",
}


@pytest.mark.parametrize("define", SAID, ids=lambda define: define.__name__.strip("_"))
def test_a_mistake_is_named_with_its_remedy(define: Callable[[], None]) -> None:
    with pytest.raises(fastlora.RuleError, match=re.escape(SAID[define])) as error:
        define()
    path, line = re.match(r"(.*?):(\d+): rule bad: ", str(error.value)).groups()  # type: ignore[union-attr]
    lines, start = inspect.getsourcelines(define)
    assert path == __file__
    assert start <= int(line) < start + len(lines)


def test_an_error_of_a_decorated_object_names_the_line_of_the_decorator() -> None:
    with pytest.raises(fastlora.RuleError, match=re.escape("@rule decorates a function, not 3")) as error:
        rule(ops.glu)(3)  # type: ignore[arg-type]
    line = inspect.currentframe().f_lineno - 1  # type: ignore[union-attr]
    assert str(error.value).startswith(f"{__file__}:{line}: ")


def test_a_name_may_stand_in_each_alternative() -> None:
    @rule(ops.glu, attrs={**GLU, "out_dtype": dtype_of("part")})
    def good(gate, up):
        return either(one=silu(gate).named("part") * up, other=tanh(gate).named("part") * up)

    assert good.names == {"gate", "up", "part"}


def test_an_operation_on_several_values_takes_a_list_as_it_takes_a_tuple() -> None:
    @rule(ops.glu, attrs=GLU)
    def good(gate, up):
        return Op("cat", tensors=[silu(gate), up])

    assert good.outputs[0].size() == 2
