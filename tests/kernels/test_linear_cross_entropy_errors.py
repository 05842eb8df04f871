"""Rounding errors of linear head + cross-entropy against eager's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import OPTIONS, arguments, set_chunks
from op_cases import DEVICE, Arguments, bf16, complete, evaluate, f16, f32
from op_precision import assert_as_precise, assert_precise_on_average, sizes, tensors

from fastlora.kernels.core.implementations import restricted
from fastlora.kernels.ops import linear_cross_entropy
from fastlora.tools.bench.accuracy import in_float64

IMPLEMENTATIONS = ["pytorch", "triton"]


def precisions() -> st.SearchStrategy[tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]]:
    """Draw the dtypes of the tensors, the head, its adapter and the logits."""
    drawn = [
        (f32, f32, f32, f32),
        (f16, f16, f16, f32),
        (f16, f16, f32, f32),
        (f32, f16, f16, f32),
        (bf16, bf16, bf16, f32),
        (bf16, bf16, f32, f32),
        (f32, bf16, bf16, f32),
        (bf16, bf16, bf16, bf16),
    ]
    interpreted = restricted.to == "triton" and DEVICE.type == "cpu"
    return st.sampled_from([dtypes for dtypes in drawn if not (interpreted and bf16 in dtypes)])


@given(st.data())
def test_errors_are_at_most_those_of_eager(data: st.DataObject) -> None:
    """For any loss, head and fraction of ignored labels, with or without autocast, in chunks of any size."""
    tokens, hidden = data.draw(sizes), data.draw(sizes)
    vocabulary = data.draw(sizes.filter(lambda size: size > 1))  # one word has a constant loss
    dtype, base, low, logits = data.draw(precisions())
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
        "z_loss": data.draw(st.sampled_from([0.0, 1e-3])),
        "base_dtype": base,
        "logits_dtype": logits,
    }
    if data.draw(st.booleans()):
        rank = data.draw(st.sampled_from([1, 3]))
        drawn |= {
            "lora_a": data.draw(tensors((rank, hidden), low, 0.3)),
            "lora_b": data.draw(tensors((vocabulary, rank), low, 0.3)),
            "scaling": data.draw(st.sampled_from([1.0, 2.5])),
            "lora_dtype": low,
        }
    with pytest.MonkeyPatch.context() as patch:
        set_chunks(patch, data.draw(st.sampled_from([1, 3, 1000])))
        assert_as_precise(linear_cross_entropy, complete(linear_cross_entropy, drawn))


DTYPES = [(f32, f32), (bf16, bf16), (f16, f16), (f32, bf16), (f32, f16)]

EVERYTHING: Arguments = {"softcap": 3.0, "scale": 0.7, "label_smoothing": 0.1, "z_loss": 0.1, "rank": 2}


OF_TOKENS = {name: options for name, options in OPTIONS.items() if name not in ("mean", "sum")}


@pytest.mark.parametrize("options", OF_TOKENS.values(), ids=OF_TOKENS)
@pytest.mark.parametrize(("dtype", "base"), DTYPES)
def test_errors_on_average(
    dtype: torch.dtype, base: torch.dtype, options: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    set_chunks(monkeypatch, 20)
    given_ = arguments(dtype, 96, 24, 31, **options | {"reduction": "none"}, bias=True) | {"base_dtype": base}
    assert_precise_on_average(linear_cross_entropy, complete(linear_cross_entropy, given_))


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("dtype", "base"), DTYPES)
def test_average_errors_of_gradients_computed_in_the_forward(
    dtype: torch.dtype, base: torch.dtype, reduction: str, options: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    set_chunks(monkeypatch, 20)
    given_ = arguments(dtype, 96, 24, 31, reduction=reduction, bias=True, **options) | {"base_dtype": base}
    assert_precise_on_average(linear_cross_entropy, complete(linear_cross_entropy, given_))


@pytest.mark.parametrize("base", [bf16, f16])
def test_average_errors_with_a_float32_adapter(base: torch.dtype) -> None:
    torch.manual_seed(0)
    given_ = arguments(base, 96, 24, 31, rank=4)
    given_ |= {n: given_[n].to(f32) + 1e-4 * torch.randn(given_[n].shape) for n in ("lora_a", "lora_b")}
    given_["lora_dtype"] = f32
    assert_precise_on_average(linear_cross_entropy, complete(linear_cross_entropy, given_))


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_errors_with_a_softcap(scale: float) -> None:
    """For logits far below the cap, where tanh(x) is almost x, and far above it, where it is almost 1."""
    torch.manual_seed(0)
    given_ = arguments(f32, 64, 16, 31, reduction="none", softcap=30.0, scale=scale)
    assert_precise_on_average(linear_cross_entropy, complete(linear_cross_entropy, given_))


def test_errors_with_large_logits_and_small_losses() -> None:
    """With lse as a single float32 number, the gradient would lose its leading digits."""
    torch.manual_seed(0)
    given_ = complete(linear_cross_entropy, arguments(f32, 64, 16, 31, reduction="none"))
    given_["weight"] *= 5
    given_["labels"] = (given_["x"] @ given_["weight"].T).argmax(-1)
    assert_precise_on_average(linear_cross_entropy, given_)


@pytest.mark.parametrize("dtype", [f16, f32])
@pytest.mark.parametrize("confidence", [1.0, 4.0])
def test_a_loss_scale_of_65536_neither_overflows_nor_underflows(dtype: torch.dtype, confidence: float) -> None:
    """The initial loss scale of float16 training."""
    torch.manual_seed(0)
    given_ = complete(linear_cross_entropy, arguments(dtype, 256, 16, 61, bias=True) | {"base_dtype": f16})
    given_["weight"] *= confidence
    scale = [torch.tensor(65536.0, device=DEVICE)]
    truth = evaluate(linear_cross_entropy.reference, in_float64(given_), grads=[scale[0].double()]).values()
    mine = evaluate(linear_cross_entropy, given_, grads=scale).values()
    eager = evaluate(linear_cross_entropy.reference, given_, grads=scale).values()
    for name, true in truth.items():
        errors = [(values[name].double() - true).square().mean().sqrt() for values in (mine, eager)]
        floor = torch.finfo(mine[name].dtype).eps * true.square().mean().sqrt()
        assert mine[name].isfinite().all()
        assert not eager[name].isfinite().all() or errors[0] <= 1.25 * errors[1] + floor
