"""Dropout from a seed: masks are the same in all implementations, random, and have the right rate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_cases import DEVICE, Arguments, Case, bf16, complete, evaluate, f16, f32, f64, native, on_device
from op_contract import contract
from op_precision import assert_as_precise, assert_precise_on_average, assert_propagates, dtypes, sizes, tensors

from fastlora.kernels.core import implementations
from fastlora.kernels.formulas.dropout import check_argument, inverse, is_cheap, mask, philox, random_words, reference
from fastlora.kernels.ops import dropout

IMPLEMENTATIONS = ["pytorch", "triton"]
ONES = 0xFFFFFFFF
KNOWN = {
    (0, 0, 0, 0, 0, 0): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    (ONES,) * 6: "408f276d 41c83b0e a20bc7c6 6d5451fd",
    (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0): "d16cfe09 94fdcceb 5001e420 24126ea1",
}
"""The words of counter and key, and of the result: kat_vectors of the paper's library, Random123."""


def seed(value: int = 1234567890123456789) -> torch.Tensor:
    return torch.tensor([value], device=DEVICE)


def arguments(
    dtype: torch.dtype, *x: int, p: float = 0.3, base: torch.dtype | None = None, out: torch.dtype | None = None
) -> Arguments:
    return {
        "x": torch.randn(x, dtype=f64).to(dtype),
        "base": None if base is None else torch.randn(x, dtype=f64).to(base),
        "seed": torch.tensor([2**40 + 7]),
        "p": p,
        "out_dtype": out or dtype,
    }


CASES = [
    Case("dropout", dropout, arguments, 2, 3, 5),
    Case("dropout, one element", dropout, arguments, 1),
    Case("dropout of nothing", dropout, arguments, 3, 5, p=0.0),
    Case("dropout added", dropout, lambda dtype: arguments(dtype, 3, 7, base=dtype)),
]


@contract(CASES)
def test_contract(case: Case, check: Any) -> None:
    check(case)


@given(st.data())
def test_errors_are_at_most_those_of_eager(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(sizes, min_size=1, max_size=3)))
    x, base, out = (data.draw(dtypes()) for _ in range(3))
    drawn = {
        "x": data.draw(tensors(shape, x)),
        "base": data.draw(tensors(shape, base)) if data.draw(st.booleans()) else None,
        "seed": torch.tensor([data.draw(st.integers(-(2**63), 2**63 - 1))]),
        "p": data.draw(st.floats(0, 1, exclude_max=True)),
        "out_dtype": out,
    }
    assert_as_precise(dropout, drawn)


@pytest.mark.parametrize("dtype", [f32, f16, bf16], ids=str)
def test_errors_on_average(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_precise_on_average(dropout, arguments(dtype, 64, 65, base=dtype))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_infs_and_nans_propagate(case: Case) -> None:
    assert_propagates(dropout, case.arguments(f32))


# ---- the random words


@pytest.mark.parametrize("words", KNOWN, ids=KNOWN.values())
def test_philox_matches_the_published_vectors(words: tuple[int, ...]) -> None:
    c0, c1, c2, c3, k0, k1 = (torch.tensor([word]) for word in words)
    assert " ".join(f"{int(word):08x}" for word in philox((c0, c1, c2, c3), (k0, k1))) == KNOWN[words]


def test_an_element_has_one_of_the_four_words_of_its_counter() -> None:
    """The counter is in its two lower words, the seed in the key."""
    high, low, key = 3, 0xFFFFFFFE, -2
    position = torch.arange(4) + 4 * (high * 2**32 + low)
    c0, c1, zero = torch.tensor([low]), torch.tensor([high]), torch.tensor([0])
    block = philox((c0, c1, zero, zero), (torch.tensor([ONES - 1]), torch.tensor([ONES])))
    assert torch.equal(random_words(torch.tensor([key]), position), torch.cat(block))


@pytest.mark.parametrize("first", [0, 5, 2**31 - 8, 2**32 - 8, 2**33 - 4, 2**34 - 16, 2**45], ids=str)
@pytest.mark.parametrize("value", [0, 1, -1, 2**32, -(2**63), 2**63 - 1], ids=str)
def test_kernels_compute_the_same_random_words(first: int, value: int, implementation: str) -> None:
    """Also for counters beyond 32 bits, which only tensors of more than 2^34 elements have."""
    if implementation != "triton":
        pytest.skip("this is the PyTorch implementation")
    from random_words_kernel import words

    position = torch.arange(64, device=DEVICE) + 4 * first
    assert torch.equal(words(seed(value), first, 64), random_words(seed(value), position))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_the_fraction_of_kept_elements_is_as_expected(p: float) -> None:
    """In total, per row and per column, within five standard deviations."""
    size = 256
    kept = dropped(torch.ones(size, size), p) != 0
    for share, count in ((kept.float().mean(), size * size), *((kept.float().mean(d), size) for d in (0, 1))):
        assert ((share - (1 - p)).abs() <= 5 * math.sqrt(p * (1 - p) / count)).all()


def test_neighbors_and_seeds_are_uncorrelated() -> None:
    p, size = 0.5, 2**14
    signs = [dropped(torch.ones(size), p, value).sub(1).sign() for value in (0, 1, 2**32, -1)]
    pairs = [(a, b) for i, a in enumerate(signs) for b in signs[:i]] + [
        (s[lag:], s[:-lag]) for s in signs for lag in (1, 4)
    ]
    for left, right in pairs:
        assert abs((left * right).mean().item()) <= 5 / math.sqrt(size / 2)


def dropped(x: torch.Tensor, p: float, value: int = 77, dtype: torch.dtype = f32) -> torch.Tensor:
    return dropout(x=x.to(DEVICE), base=None, seed=seed(value), p=p, out_dtype=dtype)


# ---- what is made of them


@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.75, 0.999, 1 - 1e-12])
@pytest.mark.parametrize("shape", [(1,), (3, 1), (5, 7), (2, 3, 130), (2051,), (4100,)], ids=str)
@pytest.mark.parametrize("dtype", [f32, f16, bf16], ids=str)
def test_implementations_agree(dtype: torch.dtype, shape: tuple[int, ...], p: float, implementation: str) -> None:
    torch.manual_seed(0)
    given_ = complete(dropout, arguments(dtype, *shape, p=p, base=dtype))
    here = [evaluate(dropout, given_ | change).values() for change in ({}, {"base": None}, {"out_dtype": f32})]
    with implementations.only("pytorch"):
        there = [evaluate(dropout, given_ | change).values() for change in ({}, {"base": None}, {"out_dtype": f32})]
    for mine, other in zip(here, there, strict=True):
        assert all(torch.equal(mine[name], value) for name, value in other.items())


@pytest.mark.parametrize("dtype", [f32, f16, bf16], ids=str)
def test_results_equal_pytorchs_for_the_same_mask(dtype: torch.dtype) -> None:
    """z and dx are x * mask * (1 / (1 - p)) in float32, rounded once."""
    x = on_device(torch.randn(33, 20).to(dtype)).requires_grad_()
    z = dropout(x=x, base=None, seed=seed(), p=0.1, out_dtype=dtype)
    kept = mask(x, seed(), 0.1, f32) != 0
    (dx,) = torch.autograd.grad(z.sum(), x)
    scaled = x.float() * torch.full_like(kept, True).float().div(torch.tensor(1 - 0.1))
    assert torch.equal(z, (scaled * kept).to(dtype))
    assert torch.equal(dx, (kept.float() * inverse(0.1)).to(dtype))


def test_the_scale_equals_that_of_pytorchs_dropout() -> None:
    for p in (0.05, 0.1, 0.3, 0.5, 0.7, 0.95):
        eager = F.dropout(torch.ones(200), p)
        assert torch.equal(eager[eager != 0], torch.tensor(inverse(p)).expand(int((eager != 0).sum())))


def test_a_probability_of_zero_changes_nothing() -> None:
    x = torch.randn(7, 9).to(DEVICE)
    assert torch.equal(dropped(x, 0.0), x)


def test_a_probability_close_to_one_keeps_almost_nothing() -> None:
    z = dropped(torch.ones(64, 64), 1 - 2**-40)
    assert not z.any()
    z = dropped(torch.ones(2**16), 1 - 2**-10)
    assert z.unique().tolist() == [0, 1024]


def test_the_mask_does_not_depend_on_strides() -> None:
    """A tensor and its copy with other strides have the same mask."""
    x = torch.randn(6, 10).to(DEVICE)
    expected = dropped(x, 0.5)
    for same in (x.t().contiguous().t(), x.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(dropped(same, 0.5), expected)
    assert torch.equal(dropped(x.view(2, 3, 10), 0.5).view(6, 10), expected)


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)], ids=str)
def test_empty_tensors_are_supported(shape: tuple[int, ...]) -> None:
    assert dropped(torch.empty(shape), 0.5).shape == shape


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan])
def test_an_invalid_probability_raises(p: float) -> None:
    with pytest.raises(ValueError, match=rf"p={p} has to be at least 0 and less than 1"):
        dropped(torch.ones(3), p)


@pytest.mark.parametrize("bad", [torch.tensor([1.0]), torch.tensor([1, 2]), torch.tensor([1], dtype=torch.int32)])
def test_an_invalid_seed_raises(bad: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"the seed is .* has to be one int64"):
        dropout(x=torch.ones(3, device=DEVICE), base=None, seed=bad.to(DEVICE), p=0.5, out_dtype=f32)


def test_a_base_of_another_shape_raises() -> None:
    x, base = (torch.ones(n, device=DEVICE) for n in (3, 1))
    with pytest.raises(ValueError, match=r"base has shape \(1,\) and x \(3,\)"):
        dropout(x=x, base=base, seed=seed(), p=0.5, out_dtype=f32)


def test_a_seed_without_a_probability_raises() -> None:
    with pytest.raises(ValueError, match=r"seed=None with dropout=0\.5: give both"):
        check_argument(None, 0.5)
    with pytest.raises(ValueError, match="x_dropped with a seed"):
        check_argument(seed(), 0.5, torch.ones(3))


@pytest.mark.pytorch_only
def test_masks_are_cheap_only_on_gpus() -> None:
    assert is_cheap(torch.empty(1, device=DEVICE)) is (DEVICE.type == "cuda")
    assert not is_cheap(torch.empty(1))


def test_only_the_seed_is_saved() -> None:
    x = torch.randn(3, 5, dtype=native(), device=DEVICE, requires_grad=True)
    z = dropout(x=x * 2, base=x * 3, seed=seed(), p=0.5, out_dtype=native())
    assert [t.numel() for t in z.grad_fn.saved_tensors if t is not None] == [1]
    (dx,) = torch.autograd.grad(z.sum(), x)
    expected = reference(torch.full_like(x, 2), None, seed(), 0.5, native()) + 3
    torch.testing.assert_close(dx, expected.detach())
