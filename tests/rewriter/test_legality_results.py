"""The legality checks AUTOGRAD, METADATA, GUARDS and SUBCLASS, and rounding, on matches that no other check refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import analyse, bf16, fresh, lora, randn, rms_norm, rotary, trace
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from fastlora.frontend.session import default_rules
from fastlora.kernels.core.library import register_op
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.match.dsl import tanh
from fastlora.match.rule import Rule, rule
from fastlora.rewrite.pipeline import rewrite
from fastlora.rewrite.refusal import Code

X, Y, W = randn(2, 3, 16), randn(2, 3, 16, seed=1), randn(16)
LAYER = (randn(24, 16, grad=False), randn(4, 16), randn(24, 4))
OTHER = (randn(24, 16, grad=False, seed=1), randn(4, 16, seed=2), randn(24, 4, seed=2))
BF16 = X.detach().to(bf16).requires_grad_()


def _toy(name: str, forward: Any, schema: str = "(Tensor x) -> (Tensor y)") -> SemanticOp:
    """Return an op whose formula is tanh."""
    return register_op(
        f"toy_{name}",
        family="toy",
        schema=schema,
        outputs=1,
        reference=lambda x, **_: x.tanh(),
        forward=forward,
        backward=lambda wanted, grads, x, **_: {"x": grads[0] * (1 - x.tanh() ** 2)},
        saves=("x",),
    )


def _tanh_is(claimed: SemanticOp) -> Rule:
    @rule(claimed, anchor="tanh")
    def toy(x):
        return tanh(x)

    return toy


# ---- AUTOGRAD


def _without_gradient(gm: fx.GraphModule, target: Any) -> None:
    for node in gm.graph.nodes:
        if node.target is target:
            node.meta["example_value"] = node.meta["example_value"].detach()


def test_a_match_without_gradients_is_not_given_any() -> None:
    import operator

    gm, _ = trace(lambda gate, up: F.silu(gate) * up, (X, Y))
    _without_gradient(gm, operator.mul)
    (made,) = rewrite(gm, default_rules())
    assert not made.chosen
    assert made.refused[0][1].code is Code.AUTOGRAD


def test_requires_grad_of_outputs_does_not_change() -> None:
    """The sum of two frozen values requires no gradient, although its norm does."""

    def function(x: Tensor, y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        total = x + y
        return rms_norm(total, w), total

    outcome = analyse(function, X.detach(), Y.detach(), W)
    assert [t.requires_grad for t in outcome.rewritten.outputs] == [True, False]
    outcome.assert_close()


def test_a_frozen_layer_is_not_grouped_with_trained_ones() -> None:
    frozen = [t.detach() for t in OTHER]
    outcome = analyse(lambda x, *layers: (lora(x, *layers[:3]), lora(x, *layers[3:])), X.detach(), *LAYER, *frozen)
    assert [t.requires_grad for t in outcome.rewritten.outputs] == [True, False]
    outcome.assert_close()


# ---- METADATA


WRONG_RESULTS = {
    "torch.float64": lambda x: (x.tanh().double(),),
    "shape": lambda x: (x.tanh()[:1],),
    "strides": lambda x: (x.tanh().transpose(0, 1).contiguous().transpose(0, 1),),
    "on meta": lambda x: (x.tanh().to("meta"),),
    "does not accept": lambda x: x.tanh().view(7),
}


@pytest.mark.parametrize("reason", WRONG_RESULTS)
def test_an_op_with_other_metadata_is_refused(reason: str) -> None:
    toy = _toy("wrong_" + reason.replace(".", "_").replace(" ", "_"), WRONG_RESULTS[reason])
    outcome = analyse(lambda x: torch.tanh(x) * 2, X, rules=[_tanh_is(toy)])
    assert Code.METADATA in outcome.codes()
    assert reason in outcome.missed()
    outcome.assert_identical()


def test_transposed_heads_stay_transposed() -> None:
    """Later nodes may depend on strides, as `view` does."""
    x = randn(2, 4, 3, 8)
    tables = randn(4, 8, grad=False), randn(4, 8, seed=1, grad=False)
    outcome = analyse(
        lambda x, cos, sin: rotary(x.transpose(1, 2), cos, sin).transpose(1, 2).view(2, 4, 24), x, *tables
    )
    assert outcome.ops == ["rotary"]
    outcome.assert_close()


# ---- GUARDS


def _guards_added(function: Any, inputs: Sequence[Any], dynamic: Sequence[tuple[int, int]], rules: Any) -> list[str]:
    """Return the guards that rewriting adds to a function with these dynamic (input, dimension) pairs."""
    added: list[str] = []

    def backend(gm: fx.GraphModule, given: list[Any]) -> Any:
        examples = [n.meta.get("example_value") for n in gm.graph.nodes if n.op == "placeholder"]
        shapes = next(e for e in examples if isinstance(e, Tensor)).fake_mode.shape_env
        before = len(shapes.guards)
        rewrite(gm, rules)
        added.extend(str(guard.expr) for guard in shapes.guards[before:])
        return gm.forward

    own = fresh(inputs)
    for position, dimension in dynamic:
        torch._dynamo.mark_dynamic(own[position], dimension)
    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True)(*own)
    return added


def test_an_op_whose_shapes_need_a_new_guard_is_refused() -> None:
    toy = _toy("guarding", lambda x: (x.tanh() if x.shape[0] < 100 else x.tanh().clone(),))
    toy_rule = _tanh_is(toy)
    codes: list[Code] = []

    def backend(gm: fx.GraphModule, given: list[Any]) -> Any:
        (made,) = rewrite(gm, [toy_rule])
        codes.extend(refusal.code for _, refusal in made.refused)
        return gm.forward

    x = randn(5, 16)
    torch._dynamo.reset()
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(lambda x: torch.tanh(x), backend=backend)(x)
    assert codes == [Code.GUARDS]


DYNAMIC = {
    "norm": (rms_norm, (X, W), [(0, 0), (0, 1)]),
    "norm of any width": (rms_norm, (X, W), [(0, 2), (1, 0)]),
    "adapter": (lora, (X, *LAYER), [(0, 0), (0, 1)]),
    "adapter of any rank": (lora, (X, *LAYER), [(2, 0), (3, 1)]),
    "gated unit": (lambda gate, up: F.silu(gate) * up, (X, Y), [(0, 0), (1, 0), (0, 2), (1, 2)]),
    "loss": (
        lambda x, w, labels: F.cross_entropy(F.linear(x, w), labels),
        (randn(6, 16), randn(32, 16), torch.arange(6)),
        [(0, 0), (2, 0)],
    ),
    "loss on any vocabulary": (
        lambda x, w, labels: F.cross_entropy(F.linear(x, w), labels),
        (randn(6, 16), randn(32, 16), torch.arange(6)),
        [(1, 0)],
    ),
    "rotary": (
        rotary,
        (randn(2, 3, 4, 8), randn(4, 8, grad=False), randn(4, 8, seed=1, grad=False)),
        [(0, 1), (0, 2), (1, 0), (2, 0)],
    ),
}


@pytest.mark.parametrize("name", DYNAMIC)
def test_matching_adds_no_guards_on_shapes(name: str) -> None:
    function, inputs, dynamic = DYNAMIC[name]
    assert _guards_added(function, inputs, dynamic, default_rules()) == []


# ---- rounding


def test_the_rounding_of_a_norm_is_an_argument_of_the_op() -> None:
    def early(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    def late(x: Tensor, w: Tensor) -> Tensor:
        h = x.float()
        return (w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))).to(x.dtype)

    for function, rounded in ((early, bf16), (late, torch.float32)):
        outcome = analyse(function, BF16, W)
        (match,) = outcome.chosen
        assert match.arguments["norm_dtype"] == rounded
        assert match.arguments["out_dtype"] == outcome.eager.outputs[0].dtype
        assert torch.equal(outcome.eager.outputs[0], outcome.rewritten.outputs[0])


def test_an_explicit_cast_of_a_result_still_rounds() -> None:
    """In a bfloat16 model with float32 adapters, the gate is rounded to bfloat16 after the float32 sum."""

    def function(x: Tensor, *layers: Tensor) -> Tensor:
        return F.silu(lora(x, *layers[:3])) * lora(x, *layers[3:])

    layers = [LAYER[0].to(bf16), *LAYER[1:], OTHER[0].to(bf16), *OTHER[1:]]
    outcome = analyse(function, BF16, *layers)
    assert outcome.ops == ["glu", "lora_group"]
    outcome.assert_tidy()
    (glu,) = [match for match in outcome.chosen if match.op.name == "glu"]
    assert glu.tensor("gate").dtype == bf16
    outcome.assert_close(2e-2)


# ---- SUBCLASS


class Rough(Tensor):
    """A wrapper subclass of a matrix that rounds to integers in products, and nowhere else."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Rough:
        options = {"dtype": inner.dtype, "strides": inner.stride()}
        made: Rough = Tensor._make_wrapper_subclass(cls, inner.shape, **options)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: None, size: Any, stride: Any) -> Rough:
        return Rough(parts["inner"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten = torch.ops.aten
        if func is aten.mm.default and isinstance(args[1], cls):
            args = (args[0].round(), args[1])
        result = func(*tree_map(lambda t: t.inner if isinstance(t, cls) else t, args), **(kwargs or {}))
        keeps = func in (aten.t.default, aten.detach.default, aten.clone.default, aten.alias.default)
        return cls(result) if keeps else result


def test_tensor_subclasses_are_not_fused() -> None:
    w, a, b = LAYER
    outcome = analyse(lora, X, Rough(w), a, b)
    assert "l_weight_ is of the tensor subclass Rough" in outcome.turned_down()
    assert outcome.ops == ["lora_add"]
    assert float((outcome.eager.outputs[0] - lora(X, w, a, b)).detach().norm()) > 1
    outcome.assert_close()
