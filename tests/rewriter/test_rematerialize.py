"""Outputs of norms that only one op reads are recomputed in the backward, bit for bit, instead of being saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import evaluate, fresh, lora, randn, rms_norm, trace
from torch import Tensor, fx

from fastlora.frontend.session import default_rules
from fastlora.lower import lowering
from fastlora.lower.lowering import lower
from fastlora.lower.rematerialize import recomputable_arguments
from fastlora.rewrite.pipeline import rewrite

X, R, W, B = randn(2, 3, 16), randn(2, 3, 16, seed=5), randn(16), randn(16, seed=6)
LAYER = (randn(24, 16, grad=False), randn(4, 16), randn(24, 4))


def alone(x: Tensor, w: Tensor, *layer: Tensor) -> Tensor:
    return lora(rms_norm(x, w), *layer)


def after_a_sum(x: Tensor, r: Tensor, w: Tensor, *layer: Tensor) -> Any:
    total = x + r
    return lora(rms_norm(total, w), *layer), total


def layer_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor, *layer: Tensor) -> Any:
    total = x + r
    return lora(F.layer_norm(total, (16,), w, b), *layer), total


def also_returned(x: Tensor, w: Tensor, *layer: Tensor) -> Any:
    y = rms_norm(x, w)
    return lora(y, *layer), y


CASES = [(alone, (X, W, *LAYER)), (after_a_sum, (X, R, W, *LAYER)), (layer_norm, (X, R, W, B, *LAYER))]


def rewritten(function: Callable[..., Any], inputs: tuple[Any, ...]) -> tuple[fx.GraphModule, list[Any]]:
    gm, given = trace(function, inputs)
    rewrite(gm, default_rules())
    return gm, given


def saved(run: Callable[..., Any], inputs: list[Any]) -> list[Tensor]:
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.detach())
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run(*inputs)
    return kept


@pytest.mark.parametrize(("function", "inputs"), CASES, ids=[f.__name__ for f, _ in CASES])
def test_rematerialized_norms_are_bit_identical_and_not_saved(
    function: Callable[..., Any], inputs: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(lowering, "recomputable_arguments", lambda _: ())
        gm, given = rewritten(function, inputs)
        plain = lower(gm, given, "eager", "default")
    gm, given = rewritten(function, inputs)
    assert [each.argument.argument for each in recomputable_arguments(gm.graph)] == ["x"]
    again = lower(gm, given, "eager", "default")
    expected, result = evaluate(plain, inputs), evaluate(again, inputs)
    for name in ("outputs", "gradients"):
        for value, truth in zip(getattr(result, name), getattr(expected, name), strict=True):
            assert torch.equal(value, truth)
    norm = rms_norm(X, W) if function is alone else None
    before, after = (saved(run, fresh(inputs)) for run in (plain, again))
    memory = [{t.data_ptr(): t.nbytes for t in kept} for kept in (before, after)]
    assert sum(memory[0].values()) - sum(memory[1].values()) == X.nbytes
    if norm is not None:
        assert any(t.shape == norm.shape and torch.allclose(t, norm) for t in before)
        assert not any(t.shape == norm.shape and torch.allclose(t, norm) for t in after)


def test_an_output_with_other_users_is_not_rematerialized() -> None:
    gm, _ = rewritten(also_returned, (X, W, *LAYER))
    assert not list(recomputable_arguments(gm.graph))


def test_an_in_place_write_to_the_norms_input_raises() -> None:
    gm, given = rewritten(after_a_sum, (X, R, W, *LAYER))
    y, total = lower(gm, given, "eager", "default")(*fresh((X, R, W, *LAYER)))
    with torch.no_grad():
        total.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_only_saved_arguments_can_be_rematerialized() -> None:
    from fastlora.kernels.core.call_site import call_site
    from fastlora.kernels.core.semantic_op import DerivedArgument
    from fastlora.kernels.ops import glu, rms_norm

    with pytest.raises(ValueError, match="does not save 'weights'"):
        call_site(glu, [None] * 4, [(DerivedArgument("weights", None, rms_norm), [])])


def test_a_norm_without_gradients_is_not_rematerialized() -> None:
    """If neither its input nor its weight requires a gradient, saving the input would save no memory."""
    frozen = [t.detach() if isinstance(t, Tensor) else t for t in (X, W)]
    gm, _ = rewritten(alone, (*frozen, *LAYER))
    assert not list(recomputable_arguments(gm.graph))
