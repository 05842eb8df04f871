"""Sums of products, thin products and split-K products, as called by the LoRA ops and the loss."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import DEVICE, bf16, f16, f32
from op_precision import assert_rounded
from op_spies import guarded_memory

from fastlora.kernels.triton.blocks import low_rank, matmul, matmul_tiles, split_k

IMPLEMENTATIONS = ["triton"]
HALF = bf16 if DEVICE.type == "cuda" else f16
NAN = math.nan

rows = st.sampled_from([1, 7, 64, 65, 129])
widths = st.sampled_from([8, 16, 72, 136, 264])
ranks = st.sampled_from([8, 16, 24, 64, 104])


@pytest.fixture(autouse=True)
def kernels_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    if not matmul_tiles.is_tuned(DEVICE):
        pytest.skip("no tiles were measured for this GPU")
    monkeypatch.setattr(low_rank, "LARGE", 0)


def draw(data: st.DataObject, dtype: torch.dtype = HALF) -> Callable[..., torch.Tensor]:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    return lambda *shape: torch.randn(shape, generator=generator).to(dtype).to(DEVICE)


@given(st.data())
def test_a_sum_of_products_is_rounded_once(data: st.DataObject) -> None:
    """In the layouts of the forward, with transposed weights, and of the backward, with up to three large products."""
    randn, (T, N, R) = draw(data), (data.draw(rows), data.draw(widths), data.draw(ranks))
    depths = [R, *data.draw(st.lists(widths, min_size=1, max_size=3))]
    transposed = data.draw(st.booleans())
    addends = [(randn(T, K), randn(N, K).t() if transposed else randn(K, N)) for K in depths]
    bias = randn(N) if data.draw(st.booleans()) else None
    dtype = data.draw(st.sampled_from([HALF, f32]))
    assert matmul.supports(addends, bias) is True
    with guarded_memory() as check:
        total = matmul.sum_of_products(addends, bias, dtype=dtype)
    check()
    truth = sum(left.double() @ right.double() for left, right in addends)
    assert_rounded(total, truth if bias is None else truth + bias.double())
    assert torch.equal(total, matmul.sum_of_products(addends, bias, dtype=dtype))


@given(st.data())
def test_limited_rows_stops_at_the_count(data: st.DataObject) -> None:
    """Rows beyond the count may be nan. Rows beyond the count's tile are not written."""
    randn, (T, N, K) = draw(data), (data.draw(rows), data.draw(widths), data.draw(widths))
    count = data.draw(st.integers(0, T))
    on_device = torch.tensor(count, device=DEVICE)
    left, right, out = randn(T, K), randn(N, K), torch.full((T + 512, N), 7.0, dtype=HALF, device=DEVICE)
    left[count:] = NAN
    matmul.limited_rows(left, right.t(), on_device, out[:T])
    assert (out[T:] == 7).all()
    if count == 0:
        assert (out == 7).all()
    else:
        assert_rounded(out[:count], left[:count].double() @ right.double().t())


@given(st.data())
def test_split_k_rounds_once_and_stops_at_the_count(data: st.DataObject) -> None:
    randn, (T, N, K) = draw(data), (data.draw(rows), data.draw(widths), data.draw(st.sampled_from([8, 136, 1032])))
    count, slices = data.draw(st.integers(0, T)), data.draw(st.integers(2, 8))
    left, right, out = randn(T, K), randn(K, N), torch.full((T + 512, N), 7.0, dtype=HALF, device=DEVICE)
    left[count:] = NAN
    right = right if data.draw(st.booleans()) else right.t().contiguous().t()
    with guarded_memory() as check:
        split_k.limited_rows(left, right, torch.tensor(count, device=DEVICE), out[:T], slices)
    check()
    assert (out[count:] == 7).all()
    if count > 0:
        assert_rounded(out[:count], left[:count].double() @ right.double())


def test_k_is_split_if_that_fills_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(split_k, "processors", lambda _: 132)
    assert split_k.plan(2048, 4096, 128256, DEVICE)[0] == 1  # 256 tiles are two waves
    assert split_k.plan(1792, 3584, 152064, DEVICE)[0] == 2  # 196 are one and a half
    assert split_k.plan(2048, 1024, 151936, DEVICE)[0] == 2
    assert split_k.plan(1, 8, 64, DEVICE)[0] == 1


@given(st.data())
def test_limited_depth_stops_at_the_count(data: st.DataObject) -> None:
    randn, (T, M, N) = draw(data), (data.draw(rows), data.draw(widths), data.draw(widths))
    count = data.draw(st.integers(0, T))
    left, right = randn(T, M), randn(T, N)
    left[count:], right[count:] = NAN, NAN
    truth = left[:count].double().t() @ right[:count].double()
    for dtype in (HALF, f32):
        out, before = torch.full((M, N), NAN, dtype=dtype, device=DEVICE), torch.randn(M, N).to(dtype).to(DEVICE)
        matmul.limited_depth(left.t(), right, torch.tensor(count, device=DEVICE), out)
        assert_rounded(out, truth)
        total = before.clone()
        matmul.limited_depth(left.t(), right, torch.tensor(count, device=DEVICE), total, add=True)
        assert torch.equal(total, before + out)


@given(st.data())
def test_thin_products(data: st.DataObject) -> None:
    randn, (T, N, K, R) = draw(data), (data.draw(rows), data.draw(widths), data.draw(widths), data.draw(ranks))
    scaling = data.draw(st.sampled_from([1.0, 0.5, 2.83]))
    x, dy, a, b, xa, dxa = randn(T, K), randn(T, N), randn(R, K), randn(N, R), randn(T, R), randn(T, R)
    with guarded_memory() as check:
        results = (
            low_rank.down(x, [a], scaling),
            *low_rank.up_gradients(dy, b, xa, scaling, f32),
            low_rank.down_gradient(dxa, x, f32),
        )
    check()
    d = [t.double() for t in (x, dy, a, b, xa, dxa)]
    truths = (scaling * d[0] @ d[2].t(), scaling * d[1] @ d[3], d[1].t() @ d[4], d[5].t() @ d[0])
    for result, truth in zip(results, truths, strict=True):
        assert result is not None
        assert_rounded(result, truth, HALF)  # PyTorch's own product, if it is selected, may round to that


def test_thin_products_of_a_group_are_concatenated() -> None:
    torch.manual_seed(0)
    x, members = torch.randn(65, 72).to(HALF).to(DEVICE), [torch.randn(R, 72).to(DEVICE) for R in (8, 16, 3)]
    xa = low_rank.down(x, members, 2.0)
    assert_rounded(xa, 2 * x.double() @ torch.cat(members).to(HALF).double().t())


def test_each_of_the_two_gradients_may_be_skipped() -> None:
    torch.manual_seed(0)
    dy, b, xa = (torch.randn(s).to(HALF).to(DEVICE) for s in ((65, 136), (136, 16), (65, 16)))
    dxa, nothing = low_rank.up_gradients(dy, b, xa, 0.5, f32, (True, False))
    assert nothing is None
    none, db = low_rank.up_gradients(dy, b, xa, 0.5, f32, (False, True))
    assert none is None
    assert dxa is not None
    assert db is not None
    assert_rounded(dxa, 0.5 * dy.double() @ b.double())
    assert_rounded(db, dy.double().t() @ xa.double(), HALF)


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [
        (torch.zeros(4, 3, dtype=HALF), torch.zeros(3, 8, dtype=HALF), "16 bytes"),
        (torch.zeros(4, 8), torch.zeros(8, 8), "float32 operands"),
        (torch.zeros(4, 8, dtype=HALF), torch.zeros(8, 3, dtype=HALF), "16 bytes"),
        (torch.zeros(4, 8, dtype=HALF), torch.zeros(8, 8), "several dtypes"),
    ],
)
def test_unsupported_operands_have_a_reason(left: torch.Tensor, right: torch.Tensor, reason: str) -> None:
    assert reason in str(matmul.supports([(left.to(DEVICE), right.to(DEVICE))]))
