"""DoRA's ops: the contract, rounding errors, and references that equal PEFT bit for bit."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import SCHEMES, Scheme, layer, scheme_of, schemes
from op_cases import DEVICE, Arguments, Case, bf16, complete, evaluate, f32, f64, leaves
from op_contract import contract
from op_precision import assert_as_precise, assert_precise_on_average, assert_propagates, sizes, tensors
from op_spies import saved_for_backward
from torch import nn

from fastlora.kernels.core.execution import Call, run_on_meta
from fastlora.kernels.formulas import dora
from fastlora.kernels.ops import dora_add, dora_linear, dora_norm

IMPLEMENTATIONS = ["pytorch"]


def _around_one(n: int, dtype: torch.dtype) -> torch.Tensor:
    return (1 + 0.3 * torch.randn(1, n, dtype=f64)).to(dtype)


def linear_arguments(
    dtype: Scheme | torch.dtype, *x: int, n: int, rank: int, biases: bool = True, flat: bool = False
) -> Arguments:
    scheme = scheme_of(dtype)
    drawn = layer(scheme, n, x[-1], rank, biases) | {"x": torch.randn(x, dtype=f64).to(scheme.x)}
    del drawn["lora_bias"]
    scale = _around_one(n, scheme.adapter)
    return {**drawn, "scale": scale[0] if flat else scale, **scheme.attributes()}


def add_arguments(dtype: Scheme | torch.dtype, *x: int, n: int, rank: int) -> Arguments:
    scheme = scheme_of(dtype)
    drawn = linear_arguments(scheme, *x, n=n, rank=rank)
    values = {name: torch.randn(*x[:-1], n, dtype=f64).to(scheme.base) for name in ("base", "plain")}
    kept = ("x", "lora_a", "lora_b", "scale", "scaling", "lora_dtype", "out_dtype")
    return {**values, **{name: drawn[name] for name in kept}}


def norm_arguments(scheme: Scheme, n: int, k: int, rank: int) -> Arguments:
    drawn = layer(scheme, n, k, rank)
    wide = torch.promote_types(scheme.x, scheme.adapter)
    dtypes = {"lora_dtype": scheme.lora, "sum_dtype": wide, "out_dtype": wide}
    return {name: drawn[name] for name in ("weight", "lora_a", "lora_b", "scaling")} | dtypes


_SMALL = {"n": 4, "rank": 2}
CASES = [
    Case("dora_linear", dora_linear, linear_arguments, 2, 3, 5, **_SMALL),
    Case("dora_linear, bare", dora_linear, linear_arguments, 3, 5, **_SMALL, biases=False),
    Case("dora_linear, one token", dora_linear, linear_arguments, 5, n=4, rank=1, flat=True),
    Case("dora_add", dora_add, add_arguments, 2, 3, 5, **_SMALL),
    Case("dora_add, one token", dora_add, add_arguments, 5, **_SMALL),
]


@contract(CASES)
def test_contract(case: Case, check: Any) -> None:
    check(case)


@given(st.data())
def test_errors_are_at_most_those_of_eager(data: st.DataObject) -> None:
    scheme = data.draw(schemes())
    n, k, rank, tokens = (data.draw(sizes) for _ in range(4))
    drawn = {
        "x": data.draw(tensors((tokens, k), scheme.x)),
        "lora_a": data.draw(tensors((rank, k), scheme.adapter)),
        "lora_b": data.draw(tensors((n, rank), scheme.adapter)),
        "scale": data.draw(tensors((1, n), scheme.adapter)),
        "scaling": data.draw(st.sampled_from([1.0, 0.5, 2.83, 16.0])),
    }
    if data.draw(st.booleans()):
        bias = data.draw(tensors((n,), scheme.weight)) if data.draw(st.booleans()) else None
        own = {"weight": data.draw(tensors((n, k), scheme.weight)), "bias": bias, **scheme.attributes()}
        assert_as_precise(dora_linear, complete(dora_linear, drawn | own))
    else:
        own = {name: data.draw(tensors((tokens, n), scheme.base)) for name in ("base", "plain")}
        dtypes = {"lora_dtype": scheme.lora, "out_dtype": scheme.out}
        assert_as_precise(dora_add, complete(dora_add, drawn | own | dtypes))


@pytest.mark.parametrize("biases", [True, False], ids=["biased", "plain"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_errors_on_average(scheme: Scheme, biases: bool) -> None:
    torch.manual_seed(0)
    assert_precise_on_average(dora_linear, linear_arguments(scheme, 96, 64, n=80, rank=8, biases=biases))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_errors_on_other_bases_on_average(scheme: Scheme) -> None:
    torch.manual_seed(0)
    assert_precise_on_average(dora_add, add_arguments(scheme, 96, 64, n=80, rank=8))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_infs_and_nans_propagate(case: Case) -> None:
    """Except for an infinite bias, which eager subtracts from itself, so its gradient of the scale is nan."""
    arguments = case.arguments(f32)
    assert_propagates(case.op, arguments | {"bias": None} if "bias" in arguments else arguments)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_gradients_have_the_dtypes_and_shapes_of_their_arguments(scheme: Scheme) -> None:
    for op, given_ in (
        (dora_linear, linear_arguments(scheme, 3, 5, n=4, rank=2)),
        (dora_add, add_arguments(scheme, 3, 5, n=4, rank=2)),
    ):
        result = evaluate(op, given_)
        for name, t in leaves(given_).items():
            assert (result.gradient(name).dtype, result.gradient(name).shape) == (t.dtype, t.shape)


@pytest.mark.parametrize(
    ("wanted", "saved"),
    [
        ({"x", "lora_a", "lora_b", "scale"}, {"x", "u"}),
        ({"x", "lora_b", "scale"}, {"u"}),
        ({"x", "lora_a", "lora_b"}, {"x"}),
        ({"x", "lora_b"}, set()),
    ],
)
def test_only_activations_that_a_gradient_reads_are_saved(wanted: set[str], saved: set[str]) -> None:
    given_ = complete(dora_linear, linear_arguments(f32, 7, 5, n=9, rank=2))
    for name, t in leaves(given_).items():
        t.requires_grad_(name in wanted)
    with saved_for_backward() as kept:
        dora_linear(**given_)
    large = {35: "x", 63: "u"}
    assert {large[t.numel()] for t in kept if t.numel() in large} == saved


@pytest.mark.parametrize("slices", [1, 3, 100], ids=lambda n: f"{n} elements")
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_norms_are_as_precise_as_eager(scheme: Scheme, slices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of rows at a time; without a gradient."""
    monkeypatch.setattr(dora, "_SLICE", slices)
    torch.manual_seed(0)
    given_ = norm_arguments(scheme, 40, 24, 6)
    assert_norms(given_)
    found = dora_norm(**{n: v.requires_grad_() if isinstance(v, torch.Tensor) else v for n, v in given_.items()})
    assert not found.requires_grad
    assert (found.shape, found.dtype) == ((40,), given_["out_dtype"])


@pytest.mark.parametrize("distance", [1.0, 1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("dtype", [f32, bf16])
def test_norms_are_precise_if_the_adapter_cancels_the_weight(dtype: torch.dtype, distance: float) -> None:
    """W equals -s B A, up to a relative distance."""
    torch.manual_seed(0)
    given_ = norm_arguments(scheme_of(dtype), 64, 96, 4)
    product = given_["lora_b"].double() @ given_["lora_a"].double() * -given_["scaling"]
    given_["weight"] = (product * (1 + distance * torch.randn(64, 96, dtype=f64))).to(dtype)
    assert_norms(given_)


def assert_norms(given_: Arguments) -> None:
    """Check root mean square errors relative to each norm, with one rounding of the result."""
    exact = {n: v.double() if isinstance(v, torch.Tensor) else f64 for n, v in given_.items() if n != "scaling"}
    truth = dora_norm.reference(**exact, scaling=given_["scaling"])
    values = [op(**given_) for op in (dora_norm, dora_norm.reference)]
    errors = [((v.double() - truth) / truth).square().mean().sqrt().item() for v in values]
    assert errors[0] <= 1.25 * errors[1] + torch.finfo(given_["out_dtype"]).eps / 2


def test_the_norm_materializes_only_slices_of_the_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dora, "_SLICE", 4 * 32)
    made, addmm = [], torch.addmm

    def spied(*given_: Any, **more: Any) -> torch.Tensor:
        made.append(addmm(*given_, **more).shape)
        return addmm(*given_, **more)

    monkeypatch.setattr(torch, "addmm", spied)
    dora_norm(**norm_arguments(SCHEMES["float32"], 10, 32, 2))
    assert made == [(4, 32), (4, 32), (2, 32)]


def test_precompiling_a_norm_runs_no_backward() -> None:
    """Although its arguments are trained."""
    given_ = norm_arguments(SCHEMES["float32"], 6, 5, 2)
    values = [v.to("meta") if isinstance(v, torch.Tensor) else v for v in dora_norm.order(given_)]
    run_on_meta(Call(dora_norm, values, [False, True, True]))


@pytest.mark.parametrize("check", ["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"])
def test_opcheck_of_the_norm(check: str) -> None:
    given_ = norm_arguments(SCHEMES["float32"], 6, 5, 2)
    torch.library.opcheck(dora_norm.target, tuple(dora_norm.order(given_)), test_utils=check)


@pytest.mark.parametrize("biases", [True, False], ids=["biased", "plain"])
@pytest.mark.parametrize("scheme", ["bfloat16", "float32 adapters on bfloat16", "autocast", "float32"])
def test_the_references_equal_peft_bit_for_bit(scheme: str, biases: bool) -> None:
    """Output and gradients, so that "eager" in these tests means PEFT."""
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.layer import Linear

    dtypes = SCHEMES[scheme]
    torch.manual_seed(0)
    given_ = complete(dora_linear, linear_arguments(dtypes, 6, 24, n=40, rank=8, biases=biases) | {"scaling": 1.5})
    config = LoraConfig(r=8, lora_alpha=12, init_lora_weights=False, use_dora=True)
    module = Linear(nn.Linear(24, 40, bias=biases), adapter_name="default", config=config, r=8, lora_alpha=12)
    module.to(DEVICE)
    magnitude = module.lora_magnitude_vector["default"].weight
    named = {"lora_a": module.lora_A["default"].weight, "lora_b": module.lora_B["default"].weight}
    named |= dict(module.base_layer.named_parameters())
    for name, parameter in named.items():
        parameter.data = given_[name].clone()
        parameter.requires_grad_(name.startswith("lora"))
    magnitude.data = torch.rand(40).to(DEVICE, dtypes.adapter) + 0.5
    x = given_["x"].clone().requires_grad_()
    with torch.autocast(DEVICE.type, bf16) if scheme == "autocast" else nullcontext():
        output = module(x * 1)
    gradients = torch.autograd.grad(output, (magnitude, named["lora_a"], named["lora_b"]), torch.ones_like(output))

    wide = torch.promote_types(dtypes.x, dtypes.adapter)
    norm_dtypes = {"lora_dtype": dtypes.lora, "sum_dtype": wide, "out_dtype": wide}
    own = {n: given_[n].clone().requires_grad_(n.startswith("lora")) for n in named}
    m = magnitude.detach().clone().requires_grad_()
    adapter = {"lora_a": own["lora_a"], "lora_b": own["lora_b"], "scaling": 1.5}
    norm = dora_norm.reference(weight=given_["weight"], **adapter, **norm_dtypes)
    given_ |= {"x": x.detach() * 1, "scale": (m / norm).view(1, -1), **own}
    reference = dora_linear.reference(**given_)
    assert torch.equal(reference, output)
    expected = torch.autograd.grad(reference, (m, own["lora_a"], own["lora_b"]), torch.ones_like(reference))
    for mine, its in zip(expected, gradients, strict=True):
        assert torch.equal(mine, its)
