"""Linear head + cross-entropy: the contract, all options, ignored and invalid labels, derivatives by sympy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import sympy
import torch
from loss_cases import OPTIONS, arguments, set_chunks
from op_cases import DEVICE, Arguments, Case, complete, evaluate, f32, f64, native, replaced
from op_contract import OF_VALUES, contract
from op_precision import (
    assert_as_precise,
    assert_derived,
    assert_propagates,
    at,
    gradient,
    random_point,
    symbols,
    value,
)

from fastlora.kernels.core.implementations import restricted
from fastlora.kernels.formulas import token_loss
from fastlora.kernels.ops import linear_cross_entropy

IMPLEMENTATIONS = ["pytorch", "triton"]

CASES = [
    *(Case(name, linear_cross_entropy, arguments, 5, 4, 5, bias=True, **options) for name, options in OPTIONS.items()),
    Case("no bias", linear_cross_entropy, arguments, 5, 4, 5),
]


@pytest.fixture(params=[1000, 2], ids=["one chunk", "chunks"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set chunks of two rows: of five tokens with three kept ones, the chunks have two, one and no kept tokens."""
    set_chunks(monkeypatch, request.param)


@contract(CASES)
def test_contract(case: Case, check: Any) -> None:
    check(case)


@contract(CASES, OF_VALUES)
def test_contract_in_chunks(case: Case, check: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    set_chunks(monkeypatch, 2)
    check(case)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_all_combinations_of_options(reduction: str, ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Softcap, smoothing, z-loss and bias, alone and together, with and without ignored labels."""
    set_chunks(monkeypatch, 2)
    for softcap, smoothing, z_loss, bias in itertools.product((0.0, 2.0), (0.0, 0.2), (0.0, 0.05), (False, True)):
        options = {"softcap": softcap, "label_smoothing": smoothing, "z_loss": z_loss, "reduction": reduction}
        torch.manual_seed(0)
        given_ = arguments(native(), 5, 4, 5, bias=bias, ignores=ignored == "some", **options)
        if ignored == "all":
            given_["labels"].fill_(-100)
        given_ = complete(linear_cross_entropy, given_)
        if native() is f64:
            result, expected = (evaluate(f, given_) for f in (linear_cross_entropy, linear_cross_entropy.reference))
            torch.testing.assert_close(result.values(), expected.values(), equal_nan=True, rtol=1e-10, atol=1e-12)
        else:
            assert_as_precise(linear_cross_entropy, given_)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_infs_and_nans_propagate(options: Arguments) -> None:
    given_ = arguments(f32, 4, 4, 5, bias=True, ignores=False, **options)
    given_["labels"] = torch.tensor([0, 4, 1, 3])
    assert_propagates(linear_cross_entropy, complete(linear_cross_entropy, given_))


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_infs_in_ignored_tokens_do_not_spread(options: Arguments, bad: float) -> None:
    torch.manual_seed(0)
    given_ = complete(linear_cross_entropy, arguments(f32, 5, 4, 5, bias=True, **options))
    ignored = given_["labels"] == given_["ignore_index"]
    spoiled = replaced(given_, {"x": given_["x"].masked_fill(ignored[:, None], bad)})
    result, expected = (evaluate(linear_cross_entropy, g).values() for g in (spoiled, given_))
    for name, found in result.items():
        assert found.isfinite().all(), name
        assert torch.equal(found, expected[name]), name
    assert not result["gradient of x"][ignored].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 4], ids=["no tokens", "all ignored"])
def test_a_batch_without_kept_tokens(tokens: int, reduction: str) -> None:
    if tokens == 0 and restricted.to == "triton":
        pytest.skip("kernels do not support empty batches")
    given_ = arguments(f32, tokens, 4, 5, bias=True, rank=2, reduction=reduction)
    given_ = complete(linear_cross_entropy, given_ | {"labels": torch.full((tokens,), -100)})
    result, expected = (evaluate(f, given_) for f in (linear_cross_entropy, linear_cross_entropy.reference))
    torch.testing.assert_close(result.values(), expected.values(), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_a_label_out_of_range_raises(bad: int) -> None:
    if DEVICE.type == "cuda":
        pytest.skip("a failed device-side assertion leaves the GPU unusable for later tests")
    given_ = arguments(f32, 7, 4, 5)
    given_["labels"][4] = bad
    with pytest.raises(IndexError, match="out of bounds"):
        linear_cross_entropy(**given_)


def test_an_unknown_reduction_raises() -> None:
    with pytest.raises(ValueError, match="must be one of mean, sum, none; got 'max'"):
        linear_cross_entropy(**complete(linear_cross_entropy, arguments(f32, 7, 4, 5, reduction="max")))


def test_a_wrong_number_of_labels_raises() -> None:
    given_ = complete(linear_cross_entropy, arguments(f32, 7, 4, 5))
    with pytest.raises(ValueError, match=r"6 labels for x of shape \(7, 4\)"):
        linear_cross_entropy(**given_ | {"labels": given_["labels"][:6]})


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tokens_may_have_several_dimensions(reduction: str) -> None:
    """x (B, S, H) with labels (B, S): an equal loss, and a gradient of x's shape."""
    given_ = complete(linear_cross_entropy, arguments(native(), 6, 4, 5, reduction=reduction))
    shaped = given_ | {"x": given_["x"].reshape(2, 3, 4), "labels": given_["labels"].reshape(2, 3)}
    result, expected = evaluate(linear_cross_entropy, shaped), evaluate(linear_cross_entropy, given_)
    assert torch.equal(result.outputs[0], expected.outputs[0])
    assert result.gradient("x").shape == (2, 3, 4)
    assert torch.equal(result.gradient("x").reshape(6, 4), expected.gradient("x"))


@pytest.mark.parametrize("z_loss", [0.0, 0.125])
@pytest.mark.parametrize(("softcap", "smoothing"), [(0.0, 0.0), (2.0, 0.0), (2.0, 0.25), (0.0, 0.25)])
def test_loss_and_logits_gradient_match_sympy(softcap: float, smoothing: float, z_loss: float) -> None:
    """For a row of the head's output, against the textbook formula."""
    logits, (g,) = symbols("l", 4), symbols("g", 1)
    label, scale = 1, 0.75
    z = [s * sympy.Rational(scale) for s in logits]
    if softcap:
        z = [sympy.Rational(softcap) * sympy.tanh(s / sympy.Rational(softcap)) for s in z]
    lse = sympy.log(sum(map(sympy.exp, z)))
    log_p = [s - lse for s in z]
    e = sympy.Rational(smoothing)
    loss = -(1 - e) * log_p[label] - e * sum(log_p) / 4 + sympy.Rational(z_loss) * lse**2
    point = random_point(logits, [g])
    options = token_loss.Loss(scale, softcap, -100, smoothing, z_loss)
    capped, t = token_loss.cap(at(point, logits)[None], options)
    labels = torch.tensor([label])
    code, peak, log_sum = token_loss.token_loss(capped, labels, options)
    assert_derived(code, torch.tensor([value(loss, point)], dtype=f64))
    derived = token_loss.logits_gradient(capped, t, peak, log_sum, labels, at(point, [g]), options)
    assert_derived(derived[0], gradient(g * loss, logits, point))
