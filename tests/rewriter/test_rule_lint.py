"""Invalid rules are errors at their definition, with file and line; valid rules of third parties are used."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import analyse, randn
from torch import Tensor

import fastlora
from fastlora.frontend.session import default_rules
from fastlora.kernels import ops
from fastlora.kernels.core.library import register_op
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.match.dsl import Op, Opt, Param, Scalar, cast, either, raised, sigmoid, silu, tanh
from fastlora.match.rule import dtype_of, fuse, group, rule


def _declare(name: str, schema: str, outputs: int = 1) -> SemanticOp:
    """Return an op that is declared and never run."""
    nothing: Callable[..., Any] = lambda *_, **__: ()  # noqa: E731
    return register_op(
        f"lint_{name}",
        family="toy",
        schema=schema,
        outputs=outputs,
        reference=nothing,
        forward=nothing,
        backward=nothing,
        saves=("x",),
    )


ONE = _declare("one", "(Tensor x) -> (Tensor y)")
SCALED = _declare("scaled", "(Tensor x, float scale) -> (Tensor y)")
BIASED = _declare("biased", "(Tensor x, Tensor? bias) -> (Tensor y)")
PAIR = _declare("pair", "(Tensor x) -> (Tensor y, Tensor z)", outputs=2)
TYPED = _declare("typed", "(Tensor x, ScalarType out_dtype) -> (Tensor y)")
LISTS = _declare("lists", "(Tensor[] x) -> (Tensor[] y)")
SINGLE_OUTPUT = _declare("single_output", "(Tensor x, float[] scale) -> (Tensor y)")
STRANGER = _declare("stranger", "(Tensor x, Tensor[] elsewhere) -> (Tensor[] y)")


def _unknown_capture():
    @rule(ONE)
    def bad(x, other):
        return tanh(x) * other


def _unknown_attribute():
    @rule(ONE, attrs={"speed": 1.0})
    def bad(x):
        return tanh(x)


def _missing_argument():
    @rule(SCALED)
    def bad(x):
        return tanh(x)


def _missing_attribute():
    @rule(TYPED)
    def bad(x):
        return tanh(x)


def _unused_parameter():
    @rule(SCALED)
    def bad(x, scale: Scalar):
        return tanh(x)


def _shrinking_alternatives():
    @rule(SCALED)
    def bad(x, scale: Scalar = 1.0):
        return either(plain=x, scaled=x * scale) + 1.0


def _shrinking_alternatives_of_one_operation():
    @rule(ONE)
    def bad(x):
        return either(short=tanh(x), long=tanh(sigmoid(x)))


def _scalar_for_a_tensor():
    @rule(ONE)
    def bad(x: Scalar):
        return Op("add", input=x, other=1.0)


def _tensor_for_a_scalar():
    @rule(SCALED)
    def bad(x, scale):
        return tanh(x) * scale


def _optional_for_a_required():
    @rule(ONE)
    def bad(x: Opt):
        return tanh(x)


def _too_few_outputs():
    @rule(PAIR)
    def bad(x):
        return tanh(x)


def _too_many_outputs():
    @rule(ONE)
    def bad(x):
        inner = sigmoid(x)
        return tanh(inner), inner


def _detached_output():
    @rule(PAIR)
    def bad(x):
        return tanh(x), sigmoid(x)


def _repeated_output():
    @rule(PAIR)
    def bad(x):
        out = tanh(x)
        return out, out


def _no_pattern():
    @rule(ONE)
    def bad(x):
        return 1.0


def _no_operation():
    @rule(ONE)
    def bad(x):
        return cast(x)


def _fusion_without_its_argument():
    @fuse(ONE)
    def bad():
        return raised(ops.glu)


def _group_of_strangers():
    @group(ONE, by="x", into=STRANGER)
    def bad(matches):
        return True


def _group_by_what_there_is_not():
    @group(ONE, by="elsewhere", into=LISTS)
    def bad(matches):
        return True


def _group_with_a_single_result():
    @group(SCALED, by="x", into=SINGLE_OUTPUT)
    def bad(matches):
        return True


WRONG: list[tuple[Callable[[], None], str]] = [
    (_unknown_capture, "'other' is not an argument of lint_one"),
    (_unknown_attribute, "attrs 'speed' is not an argument"),
    (_missing_argument, "nothing provides ['scale']"),
    (_missing_attribute, "nothing provides ['out_dtype']"),
    (_unused_parameter, "['scale'] do not appear"),
    (_shrinking_alternatives, "plain is smaller than scaled"),
    (_shrinking_alternatives_of_one_operation, "short is smaller than long"),
    (_scalar_for_a_tensor, "x is Tensor"),
    (_tensor_for_a_scalar, "scale is float"),
    (_optional_for_a_required, "x is optional in the pattern"),
    (_too_few_outputs, "returns 1 values"),
    (_too_many_outputs, "returns 2 values"),
    (_detached_output, "must be a part of the first"),
    (_repeated_output, "two of the outputs are the same value"),
    (_no_pattern, "must return a pattern"),
    (_no_operation, "no operation at its top"),
    (_fusion_without_its_argument, "'activation' is not an argument of lint_one"),
    (_group_of_strangers, "['elsewhere']"),
    (_group_by_what_there_is_not, "['elsewhere']"),
    (_group_with_a_single_result, "must be lists"),
]


@pytest.mark.parametrize(("define", "reason"), WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_an_invalid_rule_is_an_error_at_its_definition(define: Callable[[], None], reason: str) -> None:
    with pytest.raises(fastlora.RuleError, match=re.escape(reason)) as error:
        define()
    path, line = re.match(r"(.*?):(\d+): ", str(error.value)).groups()  # type: ignore[union-attr]
    lines, start = inspect.getsourcelines(define)
    assert path == __file__
    assert start <= int(line) < start + len(lines)


def test_alternatives_of_different_operations_have_any_order() -> None:
    """No value is both a tanh and a sum, so neither hides the other."""

    @rule(ONE)
    def good(x):
        return either(short=tanh(x), long=sigmoid(silu(x)) * 2.0)

    assert good.name == "good"


def _softcap_backward(wanted: Any, grads: list[Tensor], x: Tensor, cap: float) -> dict[str, Tensor]:
    t = torch.tanh(x / cap)
    return {"x": grads[0] * (1 - t * t)}


SOFTCAP = register_op(
    "third_party_softcap",
    family="softcap",
    schema="(Tensor x, float cap) -> (Tensor y)",
    outputs=1,
    reference=lambda x, cap: cap * torch.tanh(x / cap),
    forward=lambda x, cap: (cap * torch.tanh(x / cap),),
    backward=_softcap_backward,
    saves=("x",),
)


@rule(SOFTCAP, anchor="tanh")
def softcap(x, cap: Scalar):
    return tanh(x / cap) * cap


@softcap.where
def _cap_is_positive(match):
    return match.value("cap") > 0 or "its cap is not positive"


def test_a_third_party_rule_is_found_and_used() -> None:
    outcome = analyse(
        lambda x: 30.0 * torch.tanh(x / 30.0), randn(2, 8), rules=[*default_rules(), softcap], verify=True
    )
    assert outcome.ops == ["third_party_softcap"]
    assert outcome.chosen[0].arguments["cap"] == 30.0
    outcome.assert_close()


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: 30.0 * torch.tanh(x / 20.0), "softcap"),
        (lambda x: -30.0 * torch.tanh(x / -30.0), "not positive"),
        (lambda x: torch.tanh(x), "softcap"),
    ],
    ids=["two caps", "a negative cap", "no cap"],
)
def test_a_third_party_near_miss_is_explained(function: Callable[[Tensor], Tensor], reason: str) -> None:
    outcome = analyse(function, randn(2, 8), rules=[softcap])
    assert not outcome.ops
    assert reason in outcome.missed()
    outcome.assert_identical()


def test_a_third_party_rule_sees_the_traced_dtypes() -> None:
    cast_op = register_op(
        "third_party_widening",
        family="toy",
        schema="(Tensor x, Tensor weight, ScalarType out_dtype) -> (Tensor y)",
        outputs=1,
        reference=lambda x, weight, out_dtype: (x.tanh() * weight).to(out_dtype),
        forward=lambda x, weight, out_dtype: ((x.tanh() * weight).to(out_dtype),),
        backward=lambda wanted, grads, x, weight, **_: {
            "x": (grads[0].to(weight) * weight * (1 - x.tanh() ** 2)).to(x.dtype),
            "weight": (grads[0].to(weight) * x.tanh()).sum_to_size(weight.shape),
        },
        saves=("x", "weight"),
    )

    @rule(cast_op, attrs={"out_dtype": dtype_of()})
    def widened(x, weight: Param(1)):
        return cast(tanh(x) * weight)

    outcome = analyse(lambda x, w: (x.tanh() * w).half(), randn(2, 8), randn(8), rules=[widened])
    assert outcome.chosen[0].arguments["out_dtype"] == torch.float16
    outcome.assert_close(1e-3)


def test_a_third_party_op_may_save_nothing() -> None:
    doubled = register_op(
        "third_party_double",
        family="toy",
        schema="(Tensor x) -> (Tensor y)",
        outputs=1,
        reference=lambda x: x * 2,
        forward=lambda x: (x * 2,),
        backward=lambda wanted, grads, **_: {"x": grads[0] * 2},
        saves=(),
    )

    @rule(doubled)
    def double(x):
        return Op("mul", input=x, other=2.0)

    outcome = analyse(lambda x: x * 2.0, randn(2, 8), rules=[double], verify=True)
    assert outcome.ops == ["third_party_double"]
    outcome.assert_identical()
