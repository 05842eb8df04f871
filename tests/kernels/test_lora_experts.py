"""Experts with LoRA on rows sorted by expert: the contract, rounding errors, rows of no expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expert_cases import LAYOUTS, SMALL, arguments, layers
from hypothesis import given
from hypothesis import strategies as st
from op_cases import DEVICE, Case, bf16, complete, evaluate, f16, f32, leaves, native
from op_contract import contract
from op_precision import assert_as_precise, assert_precise_on_average, assert_propagates, dtypes
from op_spies import saved_for_backward
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlora.kernels.ops import lora_experts

IMPLEMENTATIONS = ["pytorch"]

CASES = [
    Case("lora_experts", lora_experts, arguments, **SMALL),
    Case("lora_experts, in first", lora_experts, arguments, **SMALL, out_first=False),
    Case("lora_experts, rows in no group", lora_experts, arguments, **SMALL, rest=2),
    Case("lora_experts, one token", lora_experts, arguments, n=3, k=2, rank=1, ends=[0, 1]),
    Case("lora_experts, one expert", lora_experts, arguments, **SMALL, ends=[6], offs_dtype=torch.int64),
]


@contract(CASES)
def test_contract(case: Case, check: Any) -> None:
    check(case)


@given(st.data())
def test_errors_are_at_most_those_of_eager(data: st.DataObject) -> None:
    assert_as_precise(lora_experts, data.draw(layers(data.draw(dtypes()))))


@LAYOUTS
@pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=str)
def test_errors_on_average(dtype: torch.dtype, out_first: bool) -> None:
    torch.manual_seed(0)
    given_ = arguments(dtype, n=80, k=64, rank=8, ends=[40, 40, 96], out_first=out_first)
    assert_precise_on_average(lora_experts, complete(lora_experts, given_))


@LAYOUTS
def test_infs_and_nans_propagate(out_first: bool) -> None:
    """For experts with tokens; for others, eager multiplies inf by zero."""
    given_ = arguments(f32, n=4, k=5, rank=2, ends=[3, 5, 7], out_first=out_first)
    assert_propagates(lora_experts, complete(lora_experts, given_))


@LAYOUTS
def test_experts_without_tokens_have_gradients_of_zeros(out_first: bool) -> None:
    result = evaluate(lora_experts, complete(lora_experts, arguments(native(), **SMALL, out_first=out_first)))
    for name in ("weight", "left", "right"):
        used = [each.any().item() for each in result.gradient(name)]
        assert used == [True, False, True], name


def test_an_empty_batch() -> None:
    given_ = complete(lora_experts, arguments(f32, **SMALL, ends=[0, 0, 0]))
    result = evaluate(lora_experts, given_)
    assert result.outputs[0].shape == (0, 4)
    assert all(not result.gradient(name).any() for name in ("x", "weight", "left", "right"))


@LAYOUTS
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_rows_of_no_group_are_not_read_and_become_zero(poison: float, out_first: bool) -> None:
    """Results do not depend on the contents of such rows, in x and in the incoming gradient."""
    given_ = complete(lora_experts, arguments(native(), **SMALL, rest=2, out_first=out_first))
    given_["x"][7:] = poison
    incoming = torch.randn(9, 4, dtype=native(), device=DEVICE)
    incoming[7:] = poison
    with_rest = evaluate(lora_experts, given_, grads=[incoming])
    without = evaluate(lora_experts, given_ | {"x": given_["x"][:7]}, grads=[incoming[:7]])
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
def test_only_activations_that_a_gradient_reads_are_saved(wanted: set[str], saved: set[str], out_first: bool) -> None:
    given_ = complete(lora_experts, arguments(f32, n=9, k=5, rank=2, out_first=out_first))
    held = {"left": "B" if out_first else "A", "right": "A" if out_first else "B"}
    for name, t in leaves(given_).items():
        t.requires_grad_(held.get(name, name) in wanted)
    with saved_for_backward() as kept:
        lora_experts(**given_)
    large = {35: "x", 14: "xa"}
    assert {large[t.numel()] for t in kept if t.numel() in large} == saved


class Sizes(TorchDispatchMode):
    """Records the number of elements of each new tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if all(r.alias_info is None for r in func._schema.returns):
            self.made += [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        return result


@LAYOUTS
def test_nothing_of_the_weights_size_is_materialized(out_first: bool) -> None:
    """Neither its sum with the adapters nor, if it is frozen, its gradient."""
    given_ = complete(lora_experts, arguments(f32, n=30, k=40, rank=2, out_first=out_first))
    size, wanted = given_["weight"].numel(), {"x", "left", "right"}
    largest = []
    for run in (lora_experts.reference, lora_experts):
        with Sizes() as sizes_:
            evaluate(run, given_, wanted)
        largest.append(max(sizes_.made))
    assert largest[0] == size
    assert largest[1] < size / 3


@pytest.mark.parametrize("ends", [[3, 2, 7], [-1, 3, 7], [3, 5, 8]], ids=str)
def test_invalid_offsets_raise(ends: list[int]) -> None:
    given_ = complete(lora_experts, arguments(f32, **SMALL)) | {
        "offs": torch.tensor(ends, dtype=torch.int32, device=DEVICE)
    }
    for run in (lora_experts, lora_experts.reference):
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
def test_mismatched_arguments_raise(name: str, change: Any, message: str) -> None:
    given_ = complete(lora_experts, arguments(f32, **SMALL))
    with pytest.raises(ValueError, match=message):
        lora_experts(**given_ | {name: change(given_[name])})


# ---- the reference is what users run


@LAYOUTS
@pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
def test_the_reference_equals_peft_and_transformers(dtype: torch.dtype, out_first: bool) -> None:
    """Bit for bit, gradients up to the order of sums, so that "eager" in these tests means PEFT and transformers."""
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
    mine = lora_experts.reference(x=x, weight=wrapper.get_param(), left=left, right=right, offs=ends, **options)
    assert torch.equal(mine, output)
    for found, its in zip(torch.autograd.grad(mine, own, incoming), expected, strict=True):
        assert (found - its).norm() <= 4 * torch.finfo(f32).eps * its.norm()
