"""Grouped products in one launch as on GPUs: `torch._grouped_mm` has the same layout requirements on a CPU."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from expert_cases import LAYOUTS, SMALL, arguments, layers
from hypothesis import given
from hypothesis import strategies as st
from op_cases import bf16, call_directly, complete, evaluate
from op_precision import assert_as_precise, assert_precise_on_average

from fastlora.kernels.core import grouped_mm
from fastlora.kernels.core.execution import Call, run_on_meta
from fastlora.kernels.core.grouped_mm import Groups, aligned, even_ends
from fastlora.kernels.ops import lora_experts

IMPLEMENTATIONS = ["pytorch"]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Compute every product by `torch._grouped_mm`; record its arguments."""
    calls: list[tuple[Any, ...]] = []
    original = grouped_mm.grouped_mm

    def spied(left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        calls.append((left, right))
        return original(left, right, offs=offs)

    monkeypatch.setattr(grouped_mm, "uses_grouped_mm", lambda like: True)
    monkeypatch.setattr(grouped_mm, "grouped_mm", spied)
    return calls


@given(st.data())
def test_grouped_products_are_as_precise_as_eager(data: st.DataObject) -> None:
    with patch.object(grouped_mm, "uses_grouped_mm", lambda like: like.dtype is bf16):
        assert_as_precise(lora_experts, data.draw(layers(bf16)))


SHAPES = [(16, 8, 8), (8, 24, 4), (16, 16, 3), (10, 6, 1)]


@LAYOUTS
@pytest.mark.parametrize(("n", "k", "rank"), SHAPES)
@pytest.mark.parametrize("rest", [0, 3])
def test_one_launch_equals_group_by_group(
    at_once: list[Any], monkeypatch: pytest.MonkeyPatch, n: int, k: int, rank: int, rest: int, out_first: bool
) -> None:
    """For any shape, although rows have to be aligned to 16 bytes."""
    given_ = complete(lora_experts, arguments(bf16, n=n, k=k, rank=rank, rest=rest, out_first=out_first))
    result = evaluate(lora_experts, given_)
    assert len(at_once) == 3 + 6
    monkeypatch.setattr(grouped_mm, "uses_grouped_mm", lambda like: False)
    expected = evaluate(lora_experts, given_)
    for name, value in expected.values().items():
        mine = result.values()[name]
        assert (mine.shape, mine.dtype, mine.stride()) == (value.shape, value.dtype, value.stride()), name
        assert (mine - value).norm() <= 2 * torch.finfo(bf16).eps * value.norm(), name
        assert not mine[7:].any() or name not in ("output 0", "gradient of x")


@LAYOUTS
def test_average_errors_of_one_launch(at_once: list[Any], out_first: bool) -> None:
    torch.manual_seed(0)
    given_ = arguments(bf16, n=80, k=64, rank=8, ends=[40, 40, 96], out_first=out_first)
    assert_precise_on_average(lora_experts, complete(lora_experts, given_))


def test_int64_offsets_are_supported(at_once: list[Any]) -> None:
    given_ = complete(lora_experts, arguments(bf16, n=16, k=8, rank=8))
    expected, found = (
        evaluate(lora_experts, given_ | {"offs": given_["offs"].to(t)}) for t in (torch.int32, torch.int64)
    )
    assert all(torch.equal(found.values()[name], value) for name, value in expected.values().items())


def test_factors_with_pefts_strides_are_supported(at_once: list[Any]) -> None:
    """The stride of B's elements of one expert is the number of experts."""
    given_ = complete(lora_experts, arguments(bf16, n=16, k=8, rank=8))
    b = given_["left"]
    apart = b.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert apart.stride(-1) == 3
    expected, found = (evaluate(lora_experts, given_ | {"left": t}) for t in (b, apart))
    assert all(torch.equal(found.values()[name], value) for name, value in expected.values().items())


@pytest.mark.parametrize(
    ("t", "copied"),
    [
        (torch.ones(4, 8, dtype=bf16), False),
        (torch.ones(4, 8, dtype=bf16).t(), False),
        (torch.ones(3, 4, 8, dtype=bf16).mT, False),
        (torch.ones(4, 16, dtype=bf16)[:, :3], False),
        (torch.ones(4, 3, dtype=bf16), True),
        (torch.ones(4, 16, dtype=bf16)[:, 1:9], True),
        (torch.ones(1, 8, dtype=bf16).expand(4, 8), True),
        (torch.ones(3, 4, 3, dtype=bf16), True),
    ],
    ids=lambda v: f"{tuple(v.shape)} of strides {v.stride()}" if isinstance(v, torch.Tensor) else str(v),
)
def test_only_unaligned_operands_are_copied(t: torch.Tensor, copied: bool) -> None:
    found = aligned(t)
    assert (found is not t) == copied
    assert torch.equal(found, t)
    assert aligned(found) is found


@pytest.mark.parametrize("all_at_once", [True, False])
def test_the_output_may_be_written_to(all_at_once: bool) -> None:
    """As in a graph that adds a bias in place: neither gradients nor arguments change."""
    given_ = complete(lora_experts, arguments(bf16, n=16, k=8, rank=8))

    def written(**values: Any) -> torch.Tensor:
        y = call_directly(lora_experts, values)[0]
        y.mul_(0)
        return y + lora_experts(**values)

    with patch.object(grouped_mm, "uses_grouped_mm", lambda like: all_at_once):
        found, expected = (evaluate(run, given_) for run in (written, lora_experts))
    for name, value in expected.values().items():
        assert torch.equal(found.values()[name], value), name


def test_meta_tensors_do_not_read_offsets() -> None:
    """No synchronization on the offsets."""
    given_ = arguments(bf16, **SMALL)
    values = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in lora_experts.order(given_)]
    run_on_meta(Call(lora_experts, values, [True, False, True, True, False]))
    groups = Groups(values[4], values[0], zero_rest=True)
    assert groups.outer(values[0], values[0]).shape == (3, 5, 5)


@pytest.mark.parametrize(("rows", "count"), [(7, 3), (2, 5), (0, 2), (9, 1)])
def test_even_ends_cover_all_rows(rows: int, count: int) -> None:
    ends = even_ends({"x": torch.ones(rows, 2), "offs": torch.zeros(count, dtype=torch.int64)})
    assert ends.dtype is torch.int64
    assert (ends.diff() >= 0).all()
    assert ends[-1] == rows
