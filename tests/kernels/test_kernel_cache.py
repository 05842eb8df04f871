"""Launches with equal keys run the same kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels.triton.host.kernel_cache import has_launch_hooks, specialization_key


def _kernel(first, second, third, CONSTANT: tl.constexpr, NAMED: tl.constexpr = 4):
    pass


FUNCTION = JITFunction(_kernel, do_not_specialize=["third"])
BACKEND = make_backend(GPUTarget("cuda", 90, 32))
DTYPES = [torch.float32, torch.bfloat16, torch.uint8]

integers = st.one_of(
    st.integers(-40, 40), st.sampled_from([2**31 - 1, 2**31, 2**31 + 16, -(2**31), -(2**31) - 1, 2**40])
)
tensors = st.builds(
    lambda dtype, start: torch.zeros(4096, dtype=dtype)[start:], st.sampled_from(DTYPES), st.sampled_from([0, 1, 64])
)
descriptors = st.builds(
    lambda dtype, rows, cols: TensorDescriptor(torch.zeros(64, 64, dtype=dtype), [64, 64], [64, 1], [rows, cols]),
    *(st.sampled_from(choices) for choices in (DTYPES[:2], [16, 32], [16, 32])),
)
values = st.one_of(st.none(), integers, st.floats(allow_nan=False), st.booleans(), tensors, descriptors)
launches = st.tuples(values, values, integers, st.sampled_from([1, 2, 16, "a", torch.float16]))


def triton_specialization(args: tuple[Any, ...]) -> list[Any]:
    """Return Triton's specialization of the arguments."""
    bind = create_function_from_signature(FUNCTION.signature, FUNCTION.params, BACKEND)
    return list(bind(*args, debug=False)[1])


@given(launches, launches)
def test_different_specializations_have_different_keys(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    if specialization_key(FUNCTION.params, one) == specialization_key(FUNCTION.params, other):
        assert triton_specialization(one) == triton_specialization(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [(3, 5), (32, 48), (2.0, 7.0), (torch.zeros(8), torch.ones(16)), (torch.zeros(9)[1:], torch.ones(5)[1:])],
    ids=str,
)
def test_unspecialized_values_share_a_key(one: Any, other: Any) -> None:
    assert specialization_key(FUNCTION.params, (one, 1, 1, 1)) == specialization_key(FUNCTION.params, (other, 1, 1, 1))


def test_launch_hooks_disable_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton import knobs

    assert not has_launch_hooks()
    monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [print])
    assert has_launch_hooks()
