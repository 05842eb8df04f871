"""LoRA layers: the contract, rounding errors in all mixtures of dtypes, dropout, and saved tensors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import SCHEMES, Scheme, layer, layers, scheme_of, schemes
from op_cases import (
    DEVICE,
    Arguments,
    Case,
    bf16,
    complete,
    cotangents,
    evaluate,
    f16,
    f32,
    f64,
    leaves,
    native,
    on_device,
)
from op_contract import contract
from op_precision import assert_as_precise, assert_precise_on_average, assert_propagates, sizes, tensors
from op_spies import saved_for_backward

from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.kernels.formulas.lora_linear import sum_products
from fastlora.kernels.ops import dropout, lora_add, lora_linear

IMPLEMENTATIONS = ["pytorch", "triton"]


def linear_arguments(
    dtype: Scheme | torch.dtype,
    *x: int,
    n: int,
    rank: int,
    dropped: bool = False,
    p: float | None = None,
    biases: bool = True,
) -> Arguments:
    """Return arguments with an explicit `x_dropped`, or with dropout of probability p from a seed."""
    scheme = scheme_of(dtype)
    return {
        **layer(scheme, n, x[-1], rank, biases),
        "x": torch.randn(x, dtype=f64).to(scheme.x),
        "x_dropped": torch.randn(x, dtype=f64).to(scheme.x) if dropped else None,
        **scheme.attributes(),
        **seeded(p),
    }


def seeded(p: float | None, seed: int = 2**40 + 7) -> Arguments:
    return {"seed": None if p is None else torch.tensor([seed]), "dropout": p}


def add_arguments(
    dtype: Scheme | torch.dtype, *x: int, n: int, rank: int, p: float | None = None, biases: bool = True
) -> Arguments:
    scheme = scheme_of(dtype)
    adapter = layer(scheme, n, x[-1], rank, biases)
    return {
        **{name: adapter[name] for name in ("lora_a", "lora_b", "lora_bias", "scaling")},
        "base": torch.randn(*x[:-1], n, dtype=f64).to(scheme.base),
        "x": torch.randn(x, dtype=f64).to(scheme.x),
        "lora_dtype": scheme.lora,
        "out_dtype": scheme.out,
        **seeded(p),
    }


_SMALL = {"n": 4, "rank": 2}
CASES = [
    Case("lora_linear", lora_linear, linear_arguments, 2, 3, 5, **_SMALL, dropped=False),
    Case("lora_linear, bare", lora_linear, linear_arguments, 2, 3, 5, **_SMALL, dropped=False, biases=False),
    Case("lora_linear, dropout", lora_linear, linear_arguments, 2, 3, 5, **_SMALL, dropped=True),
    Case("lora_linear, dropout, bare", lora_linear, linear_arguments, 3, 5, **_SMALL, dropped=True, biases=False),
    Case("lora_linear, seed", lora_linear, linear_arguments, 2, 3, 5, **_SMALL, p=0.3),
    Case("lora_linear, seed, bare", lora_linear, linear_arguments, 3, 5, **_SMALL, p=0.6, biases=False),
    Case("lora_linear, one token", lora_linear, linear_arguments, 5, n=4, rank=1, dropped=False),
    Case("lora_add", lora_add, add_arguments, 2, 3, 5, **_SMALL),
    Case("lora_add, bare", lora_add, add_arguments, 3, 5, **_SMALL, biases=False),
    Case("lora_add, seed", lora_add, add_arguments, 2, 3, 5, **_SMALL, p=0.3),
]


@contract(CASES)
def test_contract(case: Case, check: Any) -> None:
    check(case)


@given(st.data())
def test_errors_are_at_most_those_of_eager(data: st.DataObject) -> None:
    scheme = data.draw(schemes())
    n, k, rank = (data.draw(sizes) for _ in range(3))
    tokens = data.draw(st.lists(sizes, min_size=0, max_size=2))
    drawn = data.draw(layers(scheme, n, k, rank)) | {"x": data.draw(tensors((*tokens, k), scheme.x))}
    how = data.draw(st.sampled_from(["no dropout", "dropped", "seeded"]))
    if how == "dropped":
        drawn["x_dropped"] = data.draw(tensors((*tokens, k), scheme.x))
    if how == "seeded":
        drawn |= seeded(data.draw(st.sampled_from([0.1, 0.5])), data.draw(st.integers(0, 2**63 - 1)))
    assert_as_precise(lora_linear, complete(lora_linear, drawn | scheme.attributes()))


@given(st.data())
def test_errors_of_lora_add(data: st.DataObject) -> None:
    scheme = data.draw(schemes())
    n, k, rank, tokens = (data.draw(sizes) for _ in range(4))
    adapter = data.draw(layers(scheme, n, k, rank))
    drawn = {
        **{name: adapter[name] for name in ("lora_a", "lora_b", "lora_bias", "scaling")},
        "base": data.draw(tensors((tokens, n), scheme.base)),
        "x": data.draw(tensors((tokens, k), scheme.x)),
        "lora_dtype": scheme.lora,
        "out_dtype": scheme.out,
        **seeded(data.draw(st.sampled_from([None, 0.1, 0.5]))),
    }
    assert_as_precise(lora_add, drawn)


@pytest.mark.parametrize("how", [{}, {"dropped": True}, {"p": 0.1}], ids=["", "dropout", "seed"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_errors_on_average(scheme: Scheme, how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    assert_precise_on_average(lora_linear, linear_arguments(scheme, 96, 64, n=80, rank=8, **how))


@pytest.mark.parametrize("p", [None, 0.1], ids=["", "seed"])
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_average_errors_of_lora_add(scheme: Scheme, p: float | None) -> None:
    torch.manual_seed(0)
    assert_precise_on_average(lora_add, add_arguments(scheme, 96, 64, n=80, rank=8, p=p))


def test_sums_of_products_are_rounded_once_to_their_dtype() -> None:
    torch.manual_seed(0)
    a, b, c, d = (torch.randn(s).to(bf16) for s in ((16, 8), (8, 16), (16, 4), (4, 16)))
    under_autocast = sum_products([(a, b), (c, d)], f32)
    assert torch.equal(under_autocast, (a @ b).float() + (c @ d).float())
    wide_adapter = sum_products([(a, b), (c.float(), d.float())], bf16)
    assert torch.equal(wide_adapter, torch.addmm((a @ b).float(), c.float(), d.float()).to(bf16))
    exact = (a @ b).double() + c.double() @ d.double()
    assert torch.equal(sum_products([(a, b), (c, d)], bf16), exact.to(bf16))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_infs_and_nans_propagate(case: Case) -> None:
    assert_propagates(case.op, case.arguments(f32))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_gradients_have_the_dtypes_of_their_arguments(scheme: Scheme) -> None:
    """Also that of a base of another dtype, which the autograd engine casts."""
    given_ = add_arguments(scheme, 3, 5, n=4, rank=2) | {"out_dtype": f32}
    result, expected = evaluate(lora_add, given_), evaluate(lora_add.reference, given_)
    assert torch.equal(result.gradient("base"), expected.gradient("base"))
    assert all(result.gradient(name).dtype == t.dtype for name, t in leaves(given_).items())
    for how in ({"dropped": True}, {"p": 0.5}):
        given_ = linear_arguments(scheme, 3, 5, n=4, rank=2, **how)
        result = evaluate(lora_linear, given_)
        assert all(result.gradient(name).dtype == t.dtype for name, t in leaves(given_).items())


@pytest.mark.parametrize("op", [lora_linear, lora_add], ids=repr)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_dropout_from_a_seed_equals_explicit_dropout(scheme: Scheme, op: SemanticOp) -> None:
    """An explicit z, as `x_dropped` or as the adapter's input, gives equal output, dA and dB."""
    torch.manual_seed(0)
    build = linear_arguments if op is lora_linear else add_arguments
    given_ = complete(op, build(scheme, 6, 5, 16, n=24, rank=8, p=0.4))
    z = dropout(x=given_["x"], base=None, seed=given_["seed"], p=0.4, out_dtype=scheme.lora)
    stored = given_ | {"x_dropped" if op is lora_linear else "x": z, **seeded(None)}
    mine, expected = evaluate(op, given_), evaluate(op, stored)
    assert torch.equal(mine.outputs[0], expected.outputs[0])
    for name in ("lora_a", "lora_b", "lora_bias"):
        assert torch.equal(mine.gradient(name), expected.gradient(name)), name


def test_different_seeds_drop_different_elements() -> None:
    given_ = complete(lora_linear, linear_arguments(native(), 6, 16, n=24, rank=8, p=0.4))
    results = [lora_linear(**given_ | {"seed": given_["seed"] + step}) for step in (0, 0, 1)]
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize(("wrong", "said"), [({"seed": None}, "give both"), ({"dropout": 1.0}, r"p=1\.0 has to be")])
def test_invalid_dropout_arguments_raise(wrong: Arguments, said: str) -> None:
    given_ = complete(lora_linear, linear_arguments(native(), 3, 5, n=4, rank=2, p=0.5))
    with pytest.raises(ValueError, match=said):
        lora_linear(**given_ | wrong)
    with pytest.raises(ValueError, match="leave out seed and dropout"):
        lora_linear(**given_ | {"x_dropped": given_["x"]})


@pytest.mark.pytorch_only
@pytest.mark.parametrize("scheme", ["bfloat16", "float32 adapters on bfloat16", "autocast", "float32"])
def test_the_reference_equals_peft_bit_for_bit(scheme: str) -> None:
    """Output and gradients, so that "eager" in these tests means PEFT; the op's output also equals it bit for bit."""
    from peft.tuners.lora import LoraConfig
    from peft.tuners.lora.layer import Linear

    dtypes = SCHEMES[scheme]
    torch.manual_seed(0)
    drawn = linear_arguments(dtypes, 6, 5, 24, n=40, rank=8, dropped=False) | {"lora_bias": None, "scaling": 1.5}
    given_ = complete(lora_linear, drawn)
    config = LoraConfig(r=8, lora_alpha=12, init_lora_weights=False)
    module = Linear(torch.nn.Linear(24, 40), adapter_name="default", config=config, r=8, lora_alpha=12)
    adapter = {"lora_a": module.lora_A["default"].weight, "lora_b": module.lora_B["default"].weight}
    named = adapter | dict(module.base_layer.named_parameters())
    for name, parameter in named.items():
        parameter.data = given_[name].clone()
        parameter.requires_grad_()
    named["x"] = given_["x"].clone().requires_grad_()
    with torch.autocast(DEVICE.type, bf16) if scheme == "autocast" else nullcontext():
        output = module(named["x"] * 1)  # autocast would cast a leaf once for both paths, and round their sum
    gradients = dict(zip(named, torch.autograd.grad(output, tuple(named.values()), cotangents([output])), strict=True))
    reference = evaluate(lora_linear.reference, given_)
    for name, gradient in gradients.items():
        assert torch.equal(gradient, reference.gradient(name)), name
    for result in (reference.outputs[0], lora_linear(**given_)):
        assert result.dtype == output.dtype
        assert torch.equal(result, output)


@pytest.mark.parametrize(
    ("wanted", "how", "saved"),
    [
        ({"x", "lora_a", "lora_b"}, {}, {"x"}),
        ({"x", "lora_a", "lora_b"}, {"dropped": True}, {"x_dropped"}),
        ({"x", "lora_a", "lora_b"}, {"p": 0.5}, {"x"}),
        ({"x", "lora_b"}, {}, set()),
        ({"x", "lora_b"}, {"dropped": True}, set()),
        ({"x", "lora_b"}, {"p": 0.5}, set()),
        ({"weight"}, {"dropped": True}, {"x"}),
        ({"weight"}, {"p": 0.5}, {"x"}),
        ({"lora_a", "weight"}, {"dropped": True}, {"x", "x_dropped"}),
    ],
)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_only_activations_that_a_gradient_reads_are_saved(
    wanted: set[str], how: dict[str, Any], saved: set[str], compiled: bool
) -> None:
    """Neither the mask nor the dropped-out input is saved for dropout from a seed."""
    given_ = complete(lora_linear, linear_arguments(f32, 7, 5, n=4, rank=2, **how))
    for name, tensor in leaves(given_).items():
        tensor.requires_grad_(name in wanted)
    activations = {n: given_[n] * 2 for n in ("x", "x_dropped") if given_[n] is not None}
    run = torch.compile(lora_linear, backend="aot_eager", fullgraph=True) if compiled else lora_linear
    with saved_for_backward() as tensors_:
        run(**given_ | activations)
    pointers = {t.data_ptr() for t in tensors_}
    assert {n for n, t in activations.items() if t.data_ptr() in pointers} == saved
    assert sum(t.numel() == 35 for t in tensors_) == len(saved)


def test_scaled_xa_may_exceed_the_range_of_float16() -> None:
    """While y does not, since B is small: xa is 32,000, and 4 times that overflows float16."""
    given_ = linear_arguments(SCHEMES["float16"], 1, 8, n=16, rank=3, biases=False) | {"scaling": 4.0}
    sizes_and_values = {"x": ((1, 8), 40.0), "lora_a": ((3, 8), 100.0), "lora_b": ((16, 3), 0.01)}
    given_ |= {name: torch.full(size, value, dtype=f16) for name, (size, value) in sizes_and_values.items()}
    given_ = {name: on_device(value) for name, value in complete(lora_linear, given_).items()}
    found, expected = (evaluate(run, given_).values() for run in (lora_linear, lora_linear.reference))
    rounded = 4 * torch.finfo(f16).eps / 2  # xa, its product with B, that times the scaling, and the sum
    for name, value in found.items():
        finite = expected[name].isfinite()
        assert finite.any(), name
        torch.testing.assert_close(value[finite], expected[name][finite], rtol=rounded, atol=0)
