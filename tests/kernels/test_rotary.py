"""Rotary embeddings, alone and of q and k together: the contract, all layouts, and launches."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import DEVICE, Arguments, Case, bf16, evaluate, f16, f32, f64, leaves, on_device
from op_contract import contract
from op_precision import (
    assert_as_precise,
    assert_derived,
    assert_precise_on_average,
    assert_propagates,
    assert_rounded_once,
    at,
    gradient,
    random_point,
    sizes,
    symbols,
    tensors,
)
from op_spies import backward_calls, launches, saved_for_backward

from fastlora.kernels.core import implementations
from fastlora.kernels.ops import rotary, rotary_group

IMPLEMENTATIONS = ["pytorch", "triton"]
LAYOUTS = ["half", "flipped", "pairs", "interleaved"]

few = st.sampled_from([1, 2, 3, 5])
"""Each position and head takes a program, and Triton's interpreter runs programs one by one."""


def arguments(dtype: torch.dtype, layout: str, rotary_dim: int, *shape: int) -> Arguments:
    """Return x (B, heads, S, D) of the shape, and random cos and sin, which differ for the two entries of a pair."""
    batch, _, positions, _ = shape
    width = rotary_dim // 2 if layout == "interleaved" else rotary_dim
    x, cos, sin = (
        torch.randn(s, dtype=f64).to(dtype) for s in (shape, (batch, 1, positions, width), (batch, 1, positions, width))
    )
    return {"x": x, "cos": cos, "sin": sin, "layout": layout, "rotary_dim": rotary_dim} | {
        "compute_dtype": dtype,
        "out_dtype": dtype,
    }


def group_arguments(dtype: torch.dtype, layout: str, rotary_dim: int, *heads: int) -> Arguments:
    """Return members with these numbers of heads."""
    members = [arguments(dtype, layout, rotary_dim, 2, n, 4, 6) for n in heads]
    return members[0] | {"x": [member["x"] for member in members]}


CASES = [
    Case(f"{layout} {rotary_dim} of 6", rotary, arguments, layout, rotary_dim, 2, 3, 4, 6)
    for layout in LAYOUTS
    for rotary_dim in (6, 4)
]
GROUPS = [
    *(
        Case(f"{layout} {rotary_dim} of 6, 4 and 2 heads", rotary_group, group_arguments, layout, rotary_dim, 4, 2)
        for layout, rotary_dim in (("half", 6), ("flipped", 4), ("pairs", 4), ("interleaved", 6))
    ),
    Case("one member", rotary_group, group_arguments, "half", 6, 3),
    Case("three members", rotary_group, group_arguments, "half", 6, 2, 1, 3),
]


@contract([*CASES, *GROUPS])
def test_contract(case: Case, check: Any) -> None:
    check(case)


@given(st.data())
def test_errors_are_at_most_those_of_eager(data: st.DataObject) -> None:
    """Also with float32 tables on half-precision heads, with either compute dtype."""
    layout = data.draw(st.sampled_from(LAYOUTS))
    batch, heads, positions = (data.draw(few) for _ in range(3))
    pairs, rest = (data.draw(sizes) for _ in range(2))
    rest *= data.draw(st.booleans())
    dtype, angle_dtype = data.draw(st.sampled_from([(f32, f32), (bf16, bf16), (f16, f16), (bf16, f32), (f16, f32)]))
    width = pairs if layout == "interleaved" else 2 * pairs
    drawn = {
        "x": data.draw(tensors((batch, heads, positions, 2 * pairs + rest), dtype)),
        "cos": data.draw(tensors((batch, 1, positions, width), angle_dtype, magnitude=1.0)),
        "sin": data.draw(tensors((1, 1, positions, width), angle_dtype, magnitude=1.0)),
        "layout": layout,
        "rotary_dim": 2 * pairs,
        "compute_dtype": angle_dtype,
        "out_dtype": dtype,
    }
    assert_as_precise(rotary, drawn)


@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_errors_on_average(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_precise_on_average(rotary, arguments(dtype, layout, 12, 2, 8, 16, 16))


@pytest.mark.parametrize("dtype", [bf16, f16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_is_rounded_once(layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_rounded_once(rotary, arguments(dtype, layout, 12, 2, 8, 16, 16))


@given(st.data())
def test_errors_of_a_group_are_at_most_those_of_eager(data: st.DataObject) -> None:
    layout = data.draw(st.sampled_from(LAYOUTS))
    batch, positions = (data.draw(few) for _ in range(2))
    pairs, rest = (data.draw(sizes) for _ in range(2))
    rest *= data.draw(st.booleans())
    dtype, angle_dtype = data.draw(st.sampled_from([(f32, f32), (bf16, bf16), (f16, f16), (bf16, f32), (f16, f32)]))
    width = pairs if layout == "interleaved" else 2 * pairs
    heads = data.draw(st.lists(few, min_size=1, max_size=3))
    drawn = {
        "x": [data.draw(tensors((batch, n, positions, 2 * pairs + rest), dtype)) for n in heads],
        "cos": data.draw(tensors((batch, 1, positions, width), angle_dtype, magnitude=1.0)),
        "sin": data.draw(tensors((positions, width), angle_dtype, magnitude=1.0)),
        "layout": layout,
        "rotary_dim": 2 * pairs,
        "compute_dtype": angle_dtype,
        "out_dtype": dtype,
    }
    assert_as_precise(rotary_group, drawn)


@pytest.mark.parametrize("case", [*CASES, *GROUPS], ids=str)
def test_infs_and_nans_propagate(case: Case) -> None:
    assert_propagates(case.op, case.arguments(f32))


@pytest.mark.float64
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_and_gradients_match_sympy(layout: str) -> None:
    """y, dx, dcos and dsin, by the formulas of the op's docstring."""
    wide = layout != "interleaved"
    x, dy = symbols("x", 4), symbols("dy", 4)
    cos, sin = symbols("cos", 4 if wide else 2), symbols("sin", 4 if wide else 2)
    a, b, c, d = x
    if wide:
        turned = {"half": [-c, -d, a, b], "flipped": [c, d, -a, -b], "pairs": [-b, a, -d, c]}[layout]
        y = [s * k + r * i for s, r, k, i in zip(x, turned, cos, sin, strict=True)]
    else:
        y = [a * cos[0] - b * sin[0], c * cos[1] - d * sin[1], b * cos[0] + a * sin[0], d * cos[1] + c * sin[1]]
    point = random_point(x, cos, sin, dy)
    inputs = [at(point, group).requires_grad_() for group in (x, cos, sin)]
    attributes = {"layout": layout, "rotary_dim": 4, "compute_dtype": f64, "out_dtype": f64}
    output = rotary(x=inputs[0], cos=inputs[1], sin=inputs[2], **attributes)
    assert_derived(output.detach(), torch.tensor([float(sympy.sympify(e).subs(point)) for e in y], dtype=f64))
    output.backward(at(point, dy))
    loss = sum(g * e for g, e in zip(dy, y, strict=True))
    for group, tensor in zip((x, cos, sin), inputs, strict=True):
        assert tensor.grad is not None
        assert_derived(tensor.grad, gradient(loss, group, point))


@pytest.mark.parametrize("dtype", [f32, bf16])
@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("view", ["contiguous", "heads transposed", "slice of a fused projection"])
def test_strides_equal_those_of_elementwise_operators(view: str, layout: str, dtype: torch.dtype) -> None:
    batch, heads, positions, width = 2, 3, 5, 8
    x = {
        "contiguous": torch.randn(batch, heads, positions, width),
        "heads transposed": torch.randn(batch, positions, heads, width).transpose(1, 2),
        "slice of a fused projection": torch.randn(batch, positions, 9, width)[:, :, 3:6].transpose(1, 2),
    }[view].to(dtype)
    given_ = on_the_device(arguments(dtype, layout, width, batch, heads, positions, width) | {"x": x})
    assert rotary(**given_).stride() == (x.to(DEVICE) * given_["cos"]).stride()
    partial = on_the_device(arguments(dtype, layout, 4, batch, heads, positions, width) | {"x": x})
    assert rotary(**partial).is_contiguous()


def test_three_dimensional_positions() -> None:
    """Image tokens have positions in time, height and width, and each pair of a head is rotated by one of them."""
    torch.manual_seed(0)
    positions = torch.randint(0, 50, (3, 2, 5)).double()  # axis, sequence, token
    axis = torch.tensor([0, 1, 1, 2])
    angles = positions[axis].permute(1, 2, 0) * 50.0 ** -torch.linspace(0, 1, 4, dtype=f64)
    tables = {name: on_device(getattr(angles.repeat(1, 1, 2), name)()[:, None].to(f32)) for name in ("cos", "sin")}
    given_ = group_arguments(f32, "half", 8, 4, 2)
    x = [torch.randn(2, heads, 5, 8) for heads in (4, 2)]
    turned = rotary_group(**(given_ | tables | {"x": [on_device(t) for t in x]}))
    for before, after in zip(x, turned, strict=True):
        turns = torch.polar(torch.ones_like(angles), angles)[:, None]
        expected = torch.complex(before[..., :4].double(), before[..., 4:].double()) * turns
        assert_float32_near(after, torch.cat((expected.real, expected.imag), dim=-1))


def assert_float32_near(value: torch.Tensor, truth: torch.Tensor) -> None:
    assert (value.cpu().double() - truth).abs().max() <= 8 * torch.finfo(value.dtype).eps


def on_the_device(given_: Arguments) -> Arguments:
    return {name: on_device(value) for name, value in given_.items()}


@pytest.mark.parametrize("dtype", [f32, bf16, f16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 1, 6), (1, 1, 6), (6,), (2, 4, 6), (2, 4, 1), (4, 1), ()], ids=str)
def test_angles_broadcast_along_any_dimension(shape: tuple[int, ...], layout: str, dtype: torch.dtype) -> None:
    """Per head, per position, per batch, by PyTorch's rules, also if heads are the second to last dimension."""
    torch.manual_seed(0)
    width = 2 if layout == "interleaved" else 4
    tables = {name: torch.randn(*shape, width, dtype=f64).to(dtype) for name in ("cos", "sin")}
    assert_as_precise(rotary, arguments(dtype, layout, 4, 2, 4, 6, 5) | tables)


@pytest.mark.parametrize(("case", "x"), [(CASES[0], "x"), (GROUPS[0], "x[0]")], ids=str)
def test_x_is_saved_only_for_the_gradients_of_cos_and_sin(case: Case, x: str) -> None:
    given_ = case.arguments()

    def saved_shapes(*wanted: str) -> list[torch.Size]:
        with saved_for_backward() as saved:
            evaluate(case.op, given_, wanted)
        return [t.shape for t in saved]

    shape = leaves(given_)[x].shape
    assert shape not in saved_shapes(x)
    assert shape in saved_shapes(x, "cos")
    assert shape in saved_shapes("sin")


def test_a_member_without_an_incoming_gradient_gets_none() -> None:
    given_ = GROUPS[5].arguments()
    inputs = [t.requires_grad_() for t in given_["x"]]
    given_["cos"].requires_grad_()
    _, y, _ = rotary_group(**given_)
    with backward_calls(rotary_group) as calls:
        dx = torch.autograd.grad(y.square().sum(), [*inputs, given_["cos"]], allow_unused=True)
    assert calls[0][1] == [False, True, False, True, False]
    alone = {**given_, "x": inputs[1]}
    expected = torch.autograd.grad(rotary(**alone).square().sum(), [inputs[1], given_["cos"]])
    assert dx[0] is dx[2] is None
    for mine, its in zip((dx[1], dx[3]), expected, strict=True):
        assert torch.equal(mine, its)


def test_dx_has_the_dtype_of_an_x_that_is_not_saved() -> None:
    given_ = arguments(f32, "half", 4, 1, 2, 3, 4) | {"compute_dtype": bf16, "out_dtype": bf16}
    assert evaluate(rotary, given_, ("x",)).gradient("x").dtype == f32


def test_an_unknown_layout_raises() -> None:
    with (
        implementations.only("pytorch"),
        pytest.raises(ValueError, match="must be one of half, flipped, pairs, interleaved; got 'spiral'"),
    ):
        rotary(**arguments(f32, "spiral", 4, 1, 2, 3, 4))


# ---- tests of the Triton implementation


@pytest.fixture
def triton_only(implementation: str) -> None:
    if implementation != "triton":
        pytest.skip("only about the Triton implementation")


@pytest.mark.usefixtures("triton_only")
@pytest.mark.parametrize(
    ("heads", "launched"), [((4, 2), 1), ((3, 3), 1), ((2,), 1), ((4, 2, 2), 2), ((4, 2, 2, 1), 2)]
)
def test_two_members_share_a_launch(heads: tuple[int, ...], launched: int) -> None:
    given_ = group_arguments(f32, "half", 6, *heads)
    with launches() as names:
        evaluate(rotary_group, given_, [f"x[{i}]" for i in range(len(heads))])
    assert names == ["rotary_kernel"] * 2 * launched


@pytest.mark.usefixtures("triton_only")
def test_members_of_different_shapes_have_separate_launches() -> None:
    given_ = group_arguments(f32, "half", 4, 4, 2)
    given_["x"][1] = given_["x"][1][..., :5]
    with launches() as names:
        result = evaluate(rotary_group, given_)
    assert names == ["rotary_kernel"] * 4
    expected = evaluate(rotary_group.reference, given_)
    torch.testing.assert_close(result.values(), expected.values())


@pytest.mark.usefixtures("triton_only")
@pytest.mark.parametrize("layout", LAYOUTS[:3])
@pytest.mark.parametrize("heads_last", [False, True])
def test_transposed_heads_are_not_copied(heads_last: bool, layout: str) -> None:
    """The kernel reads x and writes y directly."""
    from fastlora.kernels.triton import rotary as gpu

    x = on_device(torch.randn(2, 5, 9, 8))[:, :, 3:6]
    given_ = on_the_device(arguments(f32, layout, 8, 2, 3, 5, 8))
    if heads_last:
        given_ |= {name: given_[name].transpose(1, 2) for name in ("cos", "sin")}
    else:
        x = x.transpose(1, 2)
    with patch.object(gpu, "_launch", wraps=gpu._launch) as launch:
        y = rotary(**given_ | {"x": x})
    _, (read,), (written,), *_ = launch.call_args.args
    assert read is x
    assert (written.data_ptr(), written.stride()) == (y.data_ptr(), y.stride())
    assert y.stride() == (x * given_["cos"]).stride()
    torch.testing.assert_close(y, rotary.reference(**given_ | {"x": x}))
