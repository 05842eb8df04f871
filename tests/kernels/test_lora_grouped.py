from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import (
    CONTRACT,
    DEVICE,
    Arguments,
    Case,
    bf16,
    complete,
    evaluate,
    f16,
    f32,
    f64,
    leaves,
    native,
    saved_for_backward,
)
from op_precision import assert_as_precise, assert_precise_on_average, assert_propagates, dtypes, sizes, tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlora.kernels import grouped
from fastlora.kernels.grouped import Groups, aligned, even_ends
from fastlora.kernels.ops import lora_grouped

FORMS = ["pytorch"]

ENDS = [3, 3, 7]
"""The second of three experts has no tokens."""


def arguments(
    dtype: torch.dtype,
    n: int,
    k: int,
    rank: int,
    ends: list[int] = ENDS,
    rest: int = 0,
    out_first: bool = True,
    zero_rest: bool = True,
    offs_dtype: torch.dtype = torch.int32,
) -> Arguments:
    """B is not zero, and everything scaled so that products keep the size of their inputs."""

    def randn(*shape: int, inner: int = 1) -> torch.Tensor:
        return (torch.randn(shape, dtype=f64) * inner**-0.5).to(dtype)

    count = len(ends)
    weight, a, b = randn(count, n, k, inner=k), randn(count, rank, k, inner=k), randn(count, n, rank, inner=rank)
    matrices = {"weight": weight, "left": b, "right": a}
    if not out_first:
        matrices = {name: m.mT.contiguous() for name, m in zip(matrices, (weight, a, b), strict=True)}
    options = {"scaling": 2.83, "out_first": out_first, "zero_rest": zero_rest}
    return {"x": randn(ends[-1] + rest, k), **matrices, "offs": torch.tensor(ends, dtype=offs_dtype), **options}


_SMALL = {"n": 4, "k": 5, "rank": 2}
CASES = [
    Case("lora_grouped", lora_grouped, arguments, **_SMALL),
    Case("lora_grouped, in first", lora_grouped, arguments, **_SMALL, out_first=False),
    Case("lora_grouped, rows in no group", lora_grouped, arguments, **_SMALL, rest=2),
    Case("lora_grouped, one token", lora_grouped, arguments, n=3, k=2, rank=1, ends=[0, 1]),
    Case("lora_grouped, one expert", lora_grouped, arguments, **_SMALL, ends=[6], offs_dtype=torch.int64),
]
LAYOUTS = pytest.mark.parametrize("out_first", [True, False], ids=["out first", "in first"])


@pytest.mark.parametrize("check", CONTRACT)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case, check: Any) -> None:
    check(case)


@given(st.data())
def test_errors_are_no_larger_than_eager_ones(data: st.DataObject) -> None:
    assert_as_precise(lora_grouped, data.draw(layers(data.draw(dtypes()))))


@given(st.data())
def test_errors_of_all_products_at_once_are_no_larger_than_eager_ones(data: st.DataObject) -> None:
    with patch.object(grouped, "makes_at_once", lambda like: like.dtype is bf16):
        assert_as_precise(lora_grouped, data.draw(layers(bf16)))


@st.composite
def layers(draw: st.DrawFn, dtype: torch.dtype) -> Arguments:
    """Up to four experts, some without tokens, and tokens without an expert."""
    out_first = draw(st.booleans())
    n, k, rank = (draw(sizes) for _ in range(3))
    counts = draw(st.lists(st.sampled_from([0, 1, 2, 5, 13]), min_size=1, max_size=4).filter(any))
    ends = torch.tensor(counts).cumsum(0, dtype=torch.int32)
    rest = draw(st.sampled_from([0, 3]))

    def matrix(rows: int, cols: int) -> torch.Tensor:
        return draw(tensors((len(counts), rows, cols) if out_first else (len(counts), cols, rows), dtype))

    weight, a, b = matrix(n, k), matrix(rank, k), matrix(n, rank)
    left, right = (b, a) if out_first else (a, b)
    drawn = {"x": draw(tensors((sum(counts) + rest, k), dtype)), "weight": weight, "left": left, "right": right}
    options = {"scaling": draw(st.sampled_from([1.0, 0.5, 2.83, 16.0])), "out_first": out_first}
    return complete(lora_grouped, {**drawn, "offs": ends, **options, "zero_rest": True})


@LAYOUTS
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
def test_errors_on_average(dtype: torch.dtype, out_first: bool) -> None:
    torch.manual_seed(0)
    given_ = arguments(dtype, n=80, k=64, rank=8, ends=[40, 40, 96], out_first=out_first)
    assert_precise_on_average(lora_grouped, complete(lora_grouped, given_))


@LAYOUTS
def test_infs_and_nans_propagate(out_first: bool) -> None:
    """From an expert with tokens; of one without, eager multiplies an infinite factor by zero."""
    given_ = arguments(f32, n=4, k=5, rank=2, ends=[3, 5, 7], out_first=out_first)
    assert_propagates(lora_grouped, complete(lora_grouped, given_))


@LAYOUTS
def test_experts_without_tokens_have_gradients_of_zeros(out_first: bool) -> None:
    result = evaluate(lora_grouped, complete(lora_grouped, arguments(native(), **_SMALL, out_first=out_first)))
    for name in ("weight", "left", "right"):
        used = [each.any().item() for each in result.gradient(name)]
        assert used == [True, False, True], name


def test_no_token_at_all() -> None:
    given_ = complete(lora_grouped, arguments(f32, **_SMALL, ends=[0, 0, 0]))
    result = evaluate(lora_grouped, given_)
    assert result.outputs[0].shape == (0, 4)
    assert all(not result.gradient(name).any() for name in ("x", "weight", "left", "right"))


@LAYOUTS
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_of_no_group_are_neither_read_nor_left_undefined(poison: float, out_first: bool) -> None:
    """Whatever is in them, in x and in the gradient that comes in, results are those without them, and zeros."""
    given_ = complete(lora_grouped, arguments(native(), **_SMALL, rest=2, out_first=out_first))
    given_["x"][7:] = poison
    incoming = torch.randn(9, 4, dtype=native(), device=DEVICE)
    incoming[7:] = poison
    with_rest = evaluate(lora_grouped, given_, grads=[incoming])
    without = evaluate(lora_grouped, given_ | {"x": given_["x"][:7]}, grads=[incoming[:7]])
    assert torch.equal(with_rest.outputs[0], torch.cat([without.outputs[0], torch.zeros_like(incoming[7:])]))
    dx = with_rest.gradient("x")
    assert torch.equal(dx[:7], without.gradient("x"))
    assert not dx[7:].any()
    for name in ("weight", "left", "right"):
        assert torch.equal(with_rest.gradient(name), without.gradient(name)), name


@LAYOUTS
@pytest.mark.parametrize(
    ("wanted", "saved"),
    [
        ({"x", "A", "B"}, {"x", "xa"}),
        ({"x", "B"}, {"xa"}),
        ({"x", "A"}, {"x"}),
        ({"weight"}, {"x"}),
        ({"x"}, set()),
    ],
)
def test_activations_are_saved_only_where_a_gradient_reads_them(
    wanted: set[str], saved: set[str], out_first: bool
) -> None:
    given_ = complete(lora_grouped, arguments(f32, n=9, k=5, rank=2, out_first=out_first))
    held = {"left": "B" if out_first else "A", "right": "A" if out_first else "B"}
    for name, t in leaves(given_).items():
        t.requires_grad_(held.get(name, name) in wanted)
    with saved_for_backward() as kept:
        lora_grouped(**given_)
    large = {35: "x", 14: "xa"}
    assert {large[t.numel()] for t in kept if t.numel() in large} == saved


class Sizes(TorchDispatchMode):
    """The elements of each new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if all(r.alias_info is None for r in func._schema.returns):
            self.made += [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result


@LAYOUTS
def test_nothing_of_a_frozen_weights_size_is_made(out_first: bool) -> None:
    """Neither its sum with the adapters nor a gradient, forward and backward."""
    given_ = complete(lora_grouped, arguments(f32, n=30, k=40, rank=2, out_first=out_first))
    size, wanted = given_["weight"].numel(), {"x", "left", "right"}
    largest = []
    for run in (lora_grouped.reference, lora_grouped):
        with Sizes() as sizes_:
            evaluate(run, given_, wanted)
        largest.append(max(sizes_.made))
    assert largest[0] == size
    assert largest[1] < size / 3


@pytest.mark.parametrize("ends", [[3, 2, 7], [-1, 3, 7], [3, 5, 8]], ids=str)
def test_offsets_that_are_no_ends_of_groups_are_refused(ends: list[int]) -> None:
    given_ = complete(lora_grouped, arguments(f32, **_SMALL)) | {
        "offs": torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    }
    for run in (lora_grouped, lora_grouped.reference):
        with pytest.raises(ValueError, match="are not the ends of groups of 7 rows"):
            run(**given_)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t[None], "has to be"),
        ("x", lambda t: t.double(), "one dtype"),
        ("left", lambda t: t.half(), "one dtype"),
        ("offs", lambda t: t.float(), "int32 or int64"),
        ("offs", lambda t: t[1:], "2 ends for 3 experts"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(name: str, change: Any, message: str) -> None:
    given_ = complete(lora_grouped, arguments(f32, **_SMALL))
    with pytest.raises(ValueError, match=message):
        lora_grouped(**given_ | {name: change(given_[name])})


# ---- all products at once, which GPUs make; `torch._grouped_mm` asks for the same layouts on a CPU


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Every product is made by `torch._grouped_mm`; its arguments."""
    calls: list[tuple[Any, ...]] = []
    original = torch._grouped_mm

    def spied(left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        calls.append((left, right))
        return original(left, right, offs=offs)

    monkeypatch.setattr(grouped, "makes_at_once", lambda like: True)
    monkeypatch.setattr(torch, "_grouped_mm", spied)
    return calls


SHAPES = [(16, 8, 8), (8, 24, 4), (16, 16, 3), (10, 6, 1)]


@LAYOUTS
@pytest.mark.parametrize(("n", "k", "rank"), SHAPES)
@pytest.mark.parametrize("rest", [0, 3])
def test_all_at_once_is_the_same(
    at_once: list[Any], monkeypatch: pytest.MonkeyPatch, n: int, k: int, rank: int, rest: int, out_first: bool
) -> None:
    """For any shape, though rows have to begin at multiples of 16 bytes."""
    given_ = complete(lora_grouped, arguments(bf16, n=n, k=k, rank=rank, rest=rest, out_first=out_first))
    result = evaluate(lora_grouped, given_)
    assert len(at_once) == 3 + 6
    monkeypatch.setattr(grouped, "makes_at_once", lambda like: False)
    expected = evaluate(lora_grouped, given_)
    for name, value in expected.values().items():
        mine = result.values()[name]
        assert (mine.shape, mine.dtype, mine.stride()) == (value.shape, value.dtype, value.stride()), name
        assert (mine - value).norm() <= 2 * torch.finfo(bf16).eps * value.norm(), name
        assert not mine[7:].any() or name not in ("output 0", "gradient of x")


@LAYOUTS
def test_errors_of_all_at_once_on_average(at_once: list[Any], out_first: bool) -> None:
    torch.manual_seed(0)
    given_ = arguments(bf16, n=80, k=64, rank=8, ends=[40, 40, 96], out_first=out_first)
    assert_precise_on_average(lora_grouped, complete(lora_grouped, given_))


def test_offsets_of_64_bits_are_taken(at_once: list[Any]) -> None:
    given_ = complete(lora_grouped, arguments(bf16, n=16, k=8, rank=8))
    expected, found = (
        evaluate(lora_grouped, given_ | {"offs": given_["offs"].to(t)}) for t in (torch.int32, torch.int64)
    )
    assert all(torch.equal(found.values()[name], value) for name, value in expected.values().items())


def test_factors_as_peft_lays_them_out_are_taken(at_once: list[Any]) -> None:
    """B's elements of one expert are as far apart as there are experts."""
    given_ = complete(lora_grouped, arguments(bf16, n=16, k=8, rank=8))
    b = given_["left"]
    apart = b.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    assert apart.stride(-1) == 3
    expected, found = (evaluate(lora_grouped, given_ | {"left": t}) for t in (b, apart))
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
def test_only_what_lies_otherwise_is_copied(t: torch.Tensor, copied: bool) -> None:
    found = aligned(t)
    assert (found is not t) == copied
    assert torch.equal(found, t)
    assert aligned(found) is found


@pytest.mark.parametrize("all_at_once", [True, False])
def test_the_output_may_be_written_to(all_at_once: bool) -> None:
    """As a graph does that adds a bias in place: no gradient depends on it, nor any argument."""
    given_ = complete(lora_grouped, arguments(bf16, n=16, k=8, rank=8))

    def written(**values: Any) -> torch.Tensor:
        y = lora_grouped.run(*lora_grouped.order(values))[0]
        y.mul_(0)
        return y + lora_grouped(**values)

    with patch.object(grouped, "makes_at_once", lambda like: all_at_once):
        found, expected = (evaluate(run, given_) for run in (written, lora_grouped))
    for name, value in expected.values().items():
        assert torch.equal(found.values()[name], value), name


def test_shapes_are_known_without_values() -> None:
    """Where tensors have no memory nothing waits for offsets."""
    given_ = arguments(bf16, **_SMALL)
    values = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in lora_grouped.order(given_)]
    lora_grouped.rehearse(values, [True, False, True, True, False])
    groups = Groups(values[4], values[0], zero_rest=True)
    assert groups.outer(values[0], values[0]).shape == (3, 5, 5)


@pytest.mark.parametrize(("rows", "count"), [(7, 3), (2, 5), (0, 2), (9, 1)])
def test_even_ends_leave_no_row_out(rows: int, count: int) -> None:
    ends = even_ends({"x": torch.ones(rows, 2), "offs": torch.zeros(count, dtype=torch.int64)})
    assert ends.dtype is torch.int64
    assert (ends.diff() >= 0).all()
    assert ends[-1] == rows


# ---- the reference is what users run


@LAYOUTS
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_the_reference_is_pefts_and_transformers(dtype: torch.dtype, out_first: bool) -> None:
    """Bit for bit, and gradients up to the order of sums, so "eager" in these tests is what users run."""
    from peft import LoraConfig
    from peft.tuners.lora.layer import ParamWrapper
    from transformers.integrations.moe import _grouped_linear

    torch.manual_seed(0)
    ends = torch.tensor([3, 3, 7], dtype=torch.int32)

    class Experts(torch.nn.Module):
        is_transposed = not out_first

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 16, 24 if out_first else 16).to(dtype))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return _grouped_linear(x, self.weight, ends, is_transposed=not out_first)

    options: dict[str, Any] = {"config": LoraConfig(init_lora_weights=False), "r": 2, "lora_alpha": 3}
    wrapper = ParamWrapper(Experts(), "default", parameter_name="weight", **options)
    x = torch.randn(7, 24 if out_first else 16).to(dtype).requires_grad_()
    own = [x, wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight]
    output = wrapper(x)
    incoming = torch.randn(output.shape).to(dtype)
    expected = torch.autograd.grad(output, own, incoming)

    left, right, scaling = wrapper.get_delta_factors("default")
    options = {"scaling": scaling, "out_first": out_first, "zero_rest": False}
    mine = lora_grouped.reference(x=x, weight=wrapper.get_param(), left=left, right=right, offs=ends, **options)
    assert torch.equal(mine, output)
    for found, its in zip(torch.autograd.grad(mine, own, incoming), expected, strict=True):
        assert (found - its).norm() <= 4 * torch.finfo(f32).eps * its.norm()
