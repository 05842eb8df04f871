from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import CONTRACT, Arguments, Case, bf16, complete, evaluate, f16, f32, f64
from op_precision import (
    assert_as_precise,
    assert_derived,
    assert_precise_on_average,
    assert_propagates,
    at,
    gradient,
    random_point,
    sizes,
    symbols,
    tensors,
    value,
)

from fastlora.kernels import linear_cross_entropy as module
from fastlora.kernels.ops import linear_cross_entropy

PLAIN = {"scale": 1.0, "softcap": 0.0, "ignore_index": -100, "reduction": "mean", "label_smoothing": 0.0}


def arguments(
    dtype: torch.dtype, tokens: int, hidden: int, vocabulary: int, bias: bool = False, **others: Any
) -> Arguments:
    """Logits of the size that a trained model has, in float32 or wider; every third label is ignored."""
    labels = torch.randint(0, vocabulary, (tokens,))
    labels[::3] = others.get("ignore_index", -100)
    return {
        "x": torch.randn(tokens, hidden, dtype=f64).to(dtype),
        "weight": (3 * torch.randn(vocabulary, hidden, dtype=f64) * hidden**-0.5).to(dtype),
        "bias": torch.randn(vocabulary, dtype=f64).to(dtype) if bias else None,
        "labels": labels,
        "base_dtype": dtype,
        "logits_dtype": torch.promote_types(dtype, f32),
        **PLAIN,
        **others,
    }


OPTIONS: dict[str, Arguments] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "softcap and scale": {"softcap": 3.0, "scale": 0.7},
    "ignores a word": {"ignore_index": 2, "reduction": "none", "label_smoothing": 0.1},
}
CASES = [
    *(Case(name, linear_cross_entropy, arguments, 7, 4, 5, bias=True, **options) for name, options in OPTIONS.items()),
    Case("no bias", linear_cross_entropy, arguments, 7, 4, 5),
]


@pytest.fixture(params=[64 << 20, 100], ids=["one chunk", "chunks"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 bytes are five rows of five float32 logits: seven tokens make two chunks, the second one smaller."""
    monkeypatch.setattr(module, "_CHUNK_BYTES", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("check", CONTRACT)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case, check: Any) -> None:
    check(case)


@given(st.data())
def test_errors_are_no_larger_than_eager_ones(data: st.DataObject) -> None:
    """Any reduction, soft-cap, scale, smoothing and share of ignored labels, autocast or not, in chunks of any size."""
    tokens, hidden = data.draw(sizes), data.draw(sizes)
    vocabulary = data.draw(sizes.filter(lambda size: size > 1))  # one word has a constant loss
    dtype, base, logits = data.draw(
        st.sampled_from([(f32, f32, f32), (bf16, bf16, f32), (f16, f16, f32), (f32, bf16, f32), (bf16, bf16, bf16)])
    )
    ignore_index = data.draw(st.sampled_from([-100, 0, vocabulary]))
    labels = st.one_of(st.integers(0, vocabulary - 1), st.just(ignore_index))
    drawn = {
        "x": data.draw(tensors((tokens, hidden), dtype)),
        "weight": data.draw(tensors((vocabulary, hidden), dtype)),
        "bias": data.draw(tensors((vocabulary,), dtype)) if data.draw(st.booleans()) else None,
        "labels": torch.tensor(data.draw(st.lists(labels, min_size=tokens, max_size=tokens))),
        "scale": data.draw(st.sampled_from([1.0, 0.125])),
        "softcap": data.draw(st.sampled_from([0.0, 30.0])),
        "ignore_index": ignore_index,
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1])),
        "base_dtype": base,
        "logits_dtype": logits,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CHUNK_BYTES", data.draw(st.sampled_from([1, 200, 64 << 20])))
        assert_as_precise(linear_cross_entropy, complete(linear_cross_entropy, drawn))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("dtype", "base"), [(f32, f32), (bf16, bf16), (f16, f16), (f32, bf16)])
def test_errors_on_average(
    dtype: torch.dtype, base: torch.dtype, options: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 31 * 40)
    given_ = arguments(dtype, 128, 24, 31, **options | {"reduction": "none"}, bias=True) | {"base_dtype": base}
    assert_precise_on_average(linear_cross_entropy, complete(linear_cross_entropy, given_))


def test_errors_of_a_sure_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large logits and tiny losses: lse as one float32 number would cost the gradient its leading digits."""
    torch.manual_seed(0)
    given_ = complete(linear_cross_entropy, arguments(f32, 64, 16, 31, reduction="none"))
    given_["weight"] *= 5
    given_["labels"] = (given_["x"] @ given_["weight"].T).argmax(-1)
    assert_precise_on_average(linear_cross_entropy, given_)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_infs_and_nans_propagate(case: Case) -> None:
    assert_propagates(linear_cross_entropy, case.arguments(f32))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 4], ids=["no tokens", "all ignored"])
def test_nothing_to_learn_from(tokens: int, reduction: str) -> None:
    given_ = arguments(f32, tokens, 4, 5, bias=True, reduction=reduction) | {"labels": torch.full((tokens,), -100)}
    result, expected = (evaluate(f, given_) for f in (linear_cross_entropy, linear_cross_entropy.reference))
    torch.testing.assert_close(result.values(), expected.values(), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_label_out_of_range(bad: int) -> None:
    given_ = arguments(f32, 7, 4, 5)
    given_["labels"][4] = bad
    with pytest.raises(IndexError, match="out of bounds"):
        linear_cross_entropy(**given_)


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="'max' is none of mean, sum, none"):
        linear_cross_entropy(**arguments(f32, 7, 4, 5, reduction="max"))


def test_tokens_may_have_several_dimensions() -> None:
    """x (B, S, H) with labels (B, S): the same loss, and a gradient of x's shape."""
    given_ = complete(linear_cross_entropy, arguments(f64, 6, 4, 5, reduction="none"))
    shaped = given_ | {"x": given_["x"].reshape(2, 3, 4), "labels": given_["labels"].reshape(2, 3)}
    result, expected = evaluate(linear_cross_entropy, shaped), evaluate(linear_cross_entropy, given_)
    assert torch.equal(result.outputs[0], expected.outputs[0])
    assert result.gradient("x").shape == (2, 3, 4)
    assert torch.equal(result.gradient("x").reshape(6, 4), expected.gradient("x"))


def test_chunks_cover_the_tokens_within_the_budget() -> None:
    covered = [i for chunk in module.chunks(1000, 128256) for i in range(chunk.start, chunk.stop)]
    assert covered == list(range(1000))
    assert all(4 * 128256 * (c.stop - c.start) <= 64 << 20 for c in module.chunks(1000, 128256))
    assert len(list(module.chunks(3, 1 << 40))) == 3


def test_chunks_change_nothing_but_the_order_of_float32_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bfloat16 too: what a chunk adds to the weight's gradient is not rounded to bfloat16 first."""
    torch.manual_seed(0)
    given_ = complete(linear_cross_entropy, arguments(f32, 64, 16, 31, bias=True) | {"base_dtype": bf16})
    whole = evaluate(linear_cross_entropy, given_).values()
    monkeypatch.setattr(module, "_CHUNK_BYTES", 1)
    torch.testing.assert_close(evaluate(linear_cross_entropy, given_).values(), whole, rtol=1e-5, atol=1e-8)


def test_no_tensor_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, where a chunk is a tenth of the tokens."""
    tokens, hidden, vocabulary = 400, 3, 500
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * vocabulary * tokens // 10)
    given_ = arguments(f32, tokens, hidden, vocabulary, bias=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        evaluate(linear_cross_entropy, complete(linear_cross_entropy, given_))
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 4 * vocabulary * tokens // 10


@pytest.mark.parametrize(("softcap", "smoothing"), [(0.0, 0.0), (2.0, 0.0), (2.0, 0.25), (0.0, 0.25)])
def test_loss_and_gradient_of_the_logits_are_sympys(softcap: float, smoothing: float) -> None:
    """A row of the head's output against the textbook's loss."""
    logits, (g,) = symbols("l", 4), symbols("g", 1)
    label, scale = 1, 0.75
    z = [s * sympy.Rational(scale) for s in logits]
    if softcap:
        z = [sympy.Rational(softcap) * sympy.tanh(s / sympy.Rational(softcap)) for s in z]
    log_p = [s - sympy.log(sum(map(sympy.exp, z))) for s in z]
    e = sympy.Rational(smoothing)
    loss = -(1 - e) * log_p[label] - e * sum(log_p) / 4
    point = random_point(logits, [g])
    capped, t = module.cap(at(point, logits)[None], scale, softcap)
    labels = torch.tensor([label])
    code, lse = module.token_loss(capped, labels, -100, smoothing)
    assert_derived(code, torch.tensor([value(loss, point)], dtype=f64))
    derived = module.logits_gradient(capped, t, lse, labels, at(point, [g]), scale, -100, smoothing)
    assert_derived(derived[0], gradient(g * loss, logits, point))
