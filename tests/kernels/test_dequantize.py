"""All implementations decode 4-bit weights to bitsandbytes' values bit for bit."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import DEVICE, Arguments, bf16, complete, f16, f32, on_device
from op_precision import dtypes
from op_spies import guarded_memory

from fastlora.kernels.core.implementations import only, restricted
from fastlora.kernels.formulas.dequantize import CODES
from fastlora.kernels.ops import dequantize_4bit

IMPLEMENTATIONS = ["pytorch", "triton"]


def arguments(rows: int, cols: int, nested: bool, dtype: torch.dtype = f32, **others: Any) -> Arguments:
    """Return a matrix of random 4-bit values with random scales."""
    blocksize, nested_blocksize = others.get("blocksize", 64), others.get("nested_blocksize", 256)
    blocks = -(-rows * cols // blocksize)
    given_: Arguments = {
        "packed": torch.randint(256, (-(-rows * cols // 2), 1), dtype=torch.uint8),
        "absmax": torch.rand(blocks),
        "blocksize": blocksize,
        "nested_blocksize": nested_blocksize,
        "quant_type": "nf4",
        "rows": rows,
        "cols": cols,
        "dtype": dtype,
    }
    if nested:
        given_["absmax"] = torch.randint(256, (blocks,), dtype=torch.uint8)
        given_["nested_absmax"] = torch.rand(-(-blocks // nested_blocksize))
        given_["nested_code"] = torch.linspace(-1, 1, 256)
        given_["offset"] = torch.tensor(0.3)
    return complete(dequantize_4bit, given_ | others)


@given(st.data())
def test_all_implementations_decode_equal_bits(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    given_ = arguments(
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 70)),
        data.draw(st.booleans()),
        data.draw(dtypes()),
        blocksize=data.draw(st.sampled_from([32, 64, 128, 4096])),
        nested_blocksize=data.draw(st.sampled_from([4, 256])),
        quant_type=data.draw(st.sampled_from(sorted(CODES))),
    )
    with guarded_memory() as check:
        decoded = dequantize_4bit(**given_)
    check()
    assert torch.equal(decoded, dequantize_4bit.reference(**given_))


@pytest.mark.parametrize("dtype", [f32, f16, bf16])
def test_a_matrix_of_code_values_is_decoded_exactly(dtype: torch.dtype) -> None:
    index = torch.randint(16, (6, 32))
    packed = (index[:, ::2] * 16 + index[:, 1::2]).to(torch.uint8)
    given_ = arguments(6, 32, False, dtype, packed=packed, absmax=torch.full((3,), 2.0))
    expected = on_device(2 * torch.tensor(CODES["nf4"])[index]).to(dtype)
    assert torch.equal(dequantize_4bit(**given_), expected)


def test_the_output_may_have_any_row_stride() -> None:
    """As in a wider buffer, whose other columns are not written to."""
    if restricted.to != "triton":
        pytest.skip("only the kernel writes into a given buffer")
    from fastlora.kernels.triton.dequantize import decode_into

    given_ = arguments(5, 32, True)
    workspace = torch.full((5, 40), 7.0, device=DEVICE)
    names = (
        "packed",
        "absmax",
        "nested_absmax",
        "nested_code",
        "offset",
        "blocksize",
        "nested_blocksize",
        "quant_type",
    )
    decode_into(workspace[:, :32], **{name: given_[name] for name in names})
    assert torch.equal(workspace[:, :32], dequantize_4bit.reference(**given_))
    assert (workspace[:, 32:] == 7).all()


def test_an_unknown_quant_type_raises() -> None:
    with only("pytorch"), pytest.raises(ValueError, match="must be one of nf4, fp4; got 'int4'"):
        dequantize_4bit(**arguments(2, 32, False, quant_type="int4"))


def test_cached_code_tables_are_not_fake_tensors() -> None:
    """In a separate process, since the first call fills the cache."""
    script = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from fastlora.kernels.ops import dequantize_4bit

def decoded():
    packed, absmax = torch.zeros(32, 1, dtype=torch.uint8), torch.ones(1)
    return dequantize_4bit.target(packed, absmax, None, None, None, 64, 256, "nf4", 2, 32, torch.float32)

with FakeTensorMode():
    decoded()
assert decoded().eq(-1).all()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
