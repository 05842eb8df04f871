from __future__ import annotations

from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import CONTRACT, Arguments, Case, bf16, evaluate, f16, f32, f64, saved_for_backward
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

from fastlora.kernels.ops import rotary

LAYOUTS = ["half", "flipped", "pairs", "interleaved"]


def arguments(dtype: torch.dtype, layout: str, rotary_dim: int, *shape: int) -> Arguments:
    """x (B, heads, S, D) of the shape, with cos and sin as arbitrary as x: no two entries of a pair share theirs."""
    batch, _, positions, _ = shape
    width = rotary_dim // 2 if layout == "interleaved" else rotary_dim
    x, cos, sin = (
        torch.randn(s, dtype=f64).to(dtype) for s in (shape, (batch, 1, positions, width), (batch, 1, positions, width))
    )
    return {"x": x, "cos": cos, "sin": sin, "layout": layout, "rotary_dim": rotary_dim} | {
        "compute_dtype": dtype,
        "out_dtype": dtype,
    }


CASES = [
    Case(f"{layout} {rotary_dim} of 6", rotary, arguments, layout, rotary_dim, 2, 3, 4, 6)
    for layout in LAYOUTS
    for rotary_dim in (6, 4)
]


@pytest.mark.parametrize("check", CONTRACT)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case, check: Any) -> None:
    check(case)


@given(st.data())
def test_errors_are_no_larger_than_eager_ones(data: st.DataObject) -> None:
    """Also with float32 cosines on half-precision heads, computing in either."""
    layout = data.draw(st.sampled_from(LAYOUTS))
    batch, heads, positions, pairs, rest = (data.draw(sizes) for _ in range(5))
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


@pytest.mark.parametrize("case", CASES, ids=str)
def test_infs_and_nans_propagate(case: Case) -> None:
    assert_propagates(rotary, case.arguments(f32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_turning_and_its_gradients_are_sympys(layout: str) -> None:
    """y, dx, dcos and dsin from the formulas of the docstring, entry by entry."""
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
def test_strides_are_the_elementwise_ones(view: str, layout: str, dtype: torch.dtype) -> None:
    batch, heads, positions, width = 2, 3, 5, 8
    x = {
        "contiguous": torch.randn(batch, heads, positions, width),
        "heads transposed": torch.randn(batch, positions, heads, width).transpose(1, 2),
        "slice of a fused projection": torch.randn(batch, positions, 9, width)[:, :, 3:6].transpose(1, 2),
    }[view].to(dtype)
    given_ = arguments(dtype, layout, width, batch, heads, positions, width) | {"x": x}
    assert rotary(**given_).stride() == (x * given_["cos"]).stride()
    partial = arguments(dtype, layout, 4, batch, heads, positions, width) | {"x": x}
    assert rotary(**partial).is_contiguous()


def test_x_is_saved_only_for_the_gradients_of_cos_and_sin() -> None:
    given_ = CASES[0].arguments()

    def saved_shapes(*wanted: str) -> list[torch.Size]:
        with saved_for_backward() as saved:
            evaluate(rotary, given_, wanted)
        return [t.shape for t in saved]

    shape = given_["x"].shape
    assert shape not in saved_shapes("x")
    assert shape in saved_shapes("x", "cos")
    assert shape in saved_shapes("sin")


def test_gradient_of_x_has_its_dtype_though_x_is_not_saved() -> None:
    given_ = arguments(f32, "half", 4, 1, 2, 3, 4) | {"compute_dtype": bf16, "out_dtype": bf16}
    assert evaluate(rotary, given_, ("x",)).gradient("x").dtype == f32


def test_unknown_layout() -> None:
    with pytest.raises(ValueError, match="'spiral' is none of half, flipped, pairs, interleaved"):
        rotary(**arguments(f32, "spiral", 4, 1, 2, 3, 4))
