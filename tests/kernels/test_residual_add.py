"""The residual addition before LayerNorm and RMSNorm: dropout of an operand, layouts and dtypes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import DEVICE, Arguments, Case, bf16, complete, evaluate, f16, f32, f64, leaves, native, replaced
from op_contract import contract
from op_precision import assert_as_precise, assert_precise_on_average, assert_propagates, dtypes, sizes, tensors
from op_spies import backward_calls, computed_gradients, launches, saved_for_backward

from fastlora.kernels.core import implementations
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.kernels.formulas.dropout import mask
from fastlora.kernels.ops import add_layer_norm, add_rms_norm

IMPLEMENTATIONS = ["pytorch", "triton"]
OPS = [add_layer_norm, add_rms_norm]
SEED = 2**40 + 7
P = 0.3


def attributes(op: SemanticOp, dtype: torch.dtype) -> Arguments:
    if op is add_layer_norm:
        return {"eps": 1e-3, "out_dtype": dtype}
    wide = torch.promote_types(dtype, f32)
    rounded = dict.fromkeys(("norm_dtype", "scale_dtype", "out_dtype"), dtype)
    return {"eps": 1e-3, "offset": 1.0, "compute_dtype": wide, **rounded}


def arguments(dtype: torch.dtype, op: SemanticOp, *shape: int, weight: bool = True, p: float | None = P) -> Arguments:
    operands = {name: torch.randn(shape, dtype=f64).to(dtype) for name in ("residual", "x")}
    if weight:
        operands["weight"] = torch.randn(shape[-1], dtype=f64).to(dtype)
    drawn = {} if p is None else {"seed": torch.tensor([SEED]), "dropout": p}
    return operands | attributes(op, dtype) | drawn


CASES = [
    Case(f"{op.name} of {what}", op, arguments, op, *shape, **options)
    for op in OPS
    for what, shape, options in (
        ("rows of fours", (2, 3, 8), {}),
        ("odd rows", (4, 5), {"weight": False}),
        ("one element", (1,), {}),
        ("nothing dropped", (3, 4), {"p": 0.0}),
    )
]


@contract(CASES)
def test_contract(case: Case, check: Any) -> None:
    check(case)


@given(st.data())
def test_errors_are_at_most_those_of_eager(data: st.DataObject) -> None:
    op, dtype = data.draw(st.sampled_from(OPS)), data.draw(dtypes())
    rows = data.draw(st.lists(st.sampled_from([1, 2, 3, 5, 8]), max_size=2))
    shape = [*rows, data.draw(sizes)]
    drawn = attributes(op, dtype) | {
        "seed": torch.tensor([data.draw(st.integers(-(2**63), 2**63 - 1))]),
        "dropout": data.draw(st.floats(0, 0.95)),
    }
    for name in ("x", "residual"):
        drawn[name] = data.draw(tensors(shape, dtype))
    if data.draw(st.booleans()):
        drawn["weight"] = data.draw(tensors(shape[-1:], dtype))
    assert_as_precise(op, complete(op, drawn))


@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
@pytest.mark.parametrize("op", OPS, ids=repr)
def test_errors_on_average(op: SemanticOp, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_precise_on_average(op, complete(op, arguments(dtype, op, 64, 96)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_infs_and_nans_propagate(case: Case) -> None:
    assert_propagates(case.op, case.arguments(f32))


# ---- the mask


SHAPES = [(1,), (3, 1), (5, 7), (2, 6, 3), (4, 4), (33, 20), (2, 3, 130), (3, 2052), (2, 4097)]


def dropped(op: SemanticOp, x: torch.Tensor, p: float = P, residual: torch.Tensor | None = None) -> torch.Tensor:
    """Return the op's sum."""
    given_ = {"residual": torch.zeros_like(x) if residual is None else residual, "x": x, **attributes(op, x.dtype)}
    return op(**given_, seed=torch.tensor([SEED], device=x.device), dropout=p)[1]


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9, 1 - 1e-12])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=repr)
def test_forward_and_backward_use_the_mask_of_the_seed(op: SemanticOp, shape: tuple[int, ...], p: float) -> None:
    """Whether the sum's gradient comes from the norm or from the residual stream."""
    x = torch.ones(shape, device=DEVICE, requires_grad=True)
    residual = torch.randn(shape, device=DEVICE, requires_grad=True)
    m = mask(x, torch.tensor([SEED], device=DEVICE), p, f32)
    y, total = op(residual=residual, x=x, **attributes(op, f32), seed=torch.tensor([SEED], device=DEVICE), dropout=p)
    assert torch.equal(total, residual + m)
    for output in (total, y):
        dy = torch.randn(shape, device=DEVICE)
        dresidual, dx = torch.autograd.grad(output, (residual, x), dy, retain_graph=True)
        assert torch.equal(dx, dresidual * m)


@pytest.mark.parametrize("dtype", [f32, f16, bf16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("op", OPS, ids=repr)
def test_the_sum_equals_pytorchs_for_the_same_mask(op: SemanticOp, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bit for bit: the dropped-out operand is rounded before the addition, and the sum after it."""
    torch.manual_seed(0)
    x, residual = (torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2))
    z = (x.float() * mask(x, torch.tensor([SEED], device=DEVICE), P, f32)).to(dtype)
    assert torch.equal(dropped(op, x, residual=residual), residual + z)


@pytest.mark.parametrize("op", OPS, ids=repr)
def test_the_mask_does_not_depend_on_strides(op: SemanticOp) -> None:
    """A tensor and its copies with other strides have the same mask, in forward and backward."""
    given_ = complete(op, arguments(f32, op, 3, 4, 8))
    expected = evaluate(op, given_).values()
    for names in (("x",), ("residual",), ("x", "residual")):
        for copy in (
            lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
            lambda t: t.repeat_interleave(2, -1)[..., ::2],
            lambda t: t.repeat_interleave(2, 1)[:, ::2],
            lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
        ):
            found = evaluate(op, replaced(given_, {name: copy(given_[name]) for name in names})).values()
            for name, value in expected.items():
                torch.testing.assert_close(found[name], value)


# ---- what is shared, kept and launched


@pytest.mark.parametrize("op", OPS, ids=repr)
def test_operands_share_a_gradient_without_dropout(op: SemanticOp) -> None:
    for p, tensors_ in ((None, 1), (P, 2)):
        given_ = complete(op, arguments(native(), op, 3, 8, p=p))
        inputs = [given_[name].requires_grad_() for name in ("residual", "x")]
        grads = torch.autograd.grad(op(**given_)[0].square().sum(), inputs)
        assert len({g.data_ptr() for g in grads}) == tensors_


@pytest.mark.parametrize("wanted", [("residual",), ("x",), ("residual", "x"), ("x", "weight")], ids=str)
@pytest.mark.parametrize("used", [0, 1])
@pytest.mark.parametrize("p", [None, P])
@pytest.mark.parametrize("op", OPS, ids=repr)
def test_either_output_may_be_unused(op: SemanticOp, p: float | None, used: int, wanted: tuple[str, ...]) -> None:
    """The norm, or the sum; gradients that are not needed are not computed."""
    given_ = complete(op, arguments(native(), op, 3, 8, p=p))
    inputs = [given_[name].requires_grad_() for name in wanted]
    with computed_gradients(op) as made, backward_calls(op) as calls:
        mine = torch.autograd.grad(op(**given_)[used].square().sum(), inputs, allow_unused=True)
    expected = torch.autograd.grad(op.reference(**given_)[used].square().sum(), inputs, allow_unused=True)
    for one, other in zip(mine, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
    together = {name if p else name.replace("x", "residual") for name in wanted}
    reached = {name for name in together if not (used and name == "weight")}
    assert made == ([reached] if reached else [])
    assert len(calls) == len(made)


@pytest.mark.parametrize("op", OPS, ids=repr)
def test_dropout_saves_only_the_seed(op: SemanticOp) -> None:
    saved = {}
    for p in (None, P):
        given_ = complete(op, arguments(native(), op, 3, 8, p=p))
        for t in leaves(given_).values():
            t.requires_grad_()
        with saved_for_backward() as found:
            op(**given_)
        saved[p] = sorted(t.numel() for t in found)
    assert saved[P] == sorted([*saved[None], 1])


@pytest.mark.float64
@pytest.mark.parametrize("op", OPS, ids=repr)
def test_dropout_takes_one_more_gradient(op: SemanticOp) -> None:
    assert op.cost is not None
    without, with_ = (
        [work.at({"T": 7, "H": 8, "S": S, "b": 2, "w": 2}) for work in (op.cost.forward, op.cost.backward)]
        for S in (0, 1)
    )
    assert [b - a for (_, a), (_, b) in zip(without, with_, strict=True)] == [0, 7 * 8 * 2]


@pytest.mark.parametrize("op", OPS, ids=repr)
def test_each_pass_is_one_kernel(op: SemanticOp, implementation: str) -> None:
    if implementation != "triton":
        pytest.skip("this is the PyTorch implementation")
    given_ = complete(op, arguments(f32, op, 3, 8))
    inputs = [given_[name].requires_grad_() for name in ("residual", "x")]
    with launches() as launched:
        y, total = op(**given_)
        torch.autograd.grad((y, total), inputs, (torch.ones_like(y), torch.ones_like(total)))
    assert launched == ["forward_kernel", "backward_kernel"]


# ---- operands that differ


@pytest.mark.parametrize("p", [None, P])
@pytest.mark.parametrize("op", OPS, ids=repr)
def test_operands_may_differ_in_layout(op: SemanticOp, p: float | None) -> None:
    """Results and gradients have the strides of PyTorch's sum, for transposed and expanded operands."""
    drawn = complete(op, arguments(f32, op, 3, 4, 8, p=p))
    copies = {
        "plain": lambda t: t,
        "turned": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": lambda t: t[:, :1].expand(3, 4, 8),
    }
    for left, right in itertools.product(copies.values(), repeat=2):
        given_ = drawn | {"residual": left(drawn["residual"]), "x": right(drawn["x"])}
        here = evaluate(op, given_).values()
        with implementations.only("pytorch"):
            there = evaluate(op, given_).values()
        dropped_like = torch.empty_like(given_["x"]) if p else given_["x"]
        assert here["output 1"].stride() == (given_["residual"] + dropped_like).stride()
        for name, value in there.items():
            assert here[name].stride() == value.stride()
            torch.testing.assert_close(here[name], value)


@pytest.mark.parametrize("wide", ["residual", "x"])
@pytest.mark.parametrize("op", OPS, ids=repr)
def test_operands_may_differ_in_dtype(op: SemanticOp, wide: str) -> None:
    """A float32 residual stream and a half-precision branch, or vice versa: each gradient has its operand's dtype."""
    drawn = complete(op, arguments(f16, op, 6, 8))
    drawn[wide] = drawn[wide].float()
    result = evaluate(op, drawn)
    assert result.outputs[1].dtype == f32
    for name in ("residual", "x"):
        assert result.gradient(name).dtype == drawn[name].dtype
    assert_as_precise(op, drawn)


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seed": None}, r"seed=None with dropout=0\.3: give both"),
        ({"dropout": None}, "with dropout=None: give both"),
        ({"dropout": 1.0}, r"p=1\.0 has to be at least 0 and less than 1"),
        ({"seed": torch.tensor([1.0])}, "has to be one int64"),
        ({"seed": torch.tensor([1, 2])}, "has to be one int64"),
    ],
    ids=str,
)
@pytest.mark.parametrize("op", OPS, ids=repr)
def test_invalid_arguments_raise(op: SemanticOp, change: Arguments, reason: str) -> None:
    given_ = complete(op, arguments(f32, op, 3, 8) | change)
    for function in (op, op.reference):
        with pytest.raises(ValueError, match=reason):
            function(**given_)
