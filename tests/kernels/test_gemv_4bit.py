"""Products of a few rows with 4-bit weights that are dequantized in registers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import layer, scheme_of
from op_cases import DEVICE, bf16, complete, f16, f32, on_device
from op_precision import assert_rounded
from op_spies import guarded_memory, launches

from fastlora.kernels.core.call_site import call_site
from fastlora.kernels.core.quantized_weight import QuantizedWeight
from fastlora.kernels.core.semantic_op import DerivedArgument
from fastlora.kernels.ops import dequantize_4bit, lora_linear
from fastlora.kernels.triton.blocks import gemv_4bit, matmul_tiles

IMPLEMENTATIONS = ["triton"]
HALF = bf16 if DEVICE.type == "cuda" else f16


@pytest.fixture(autouse=True)
def kernels_for_all_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    if not matmul_tiles.is_tuned(DEVICE):
        pytest.skip("the kernels were not measured on this GPU")
    monkeypatch.setattr(gemv_4bit, "LARGE", 0)


def quantized(
    rows: int, cols: int, nested: bool, dtype: torch.dtype = HALF, blocksize: int = 64, **others: Any
) -> QuantizedWeight:
    blocks = -(-rows * cols // blocksize)
    given_ = {
        "packed": torch.randint(256, (rows * cols // 2, 1), dtype=torch.uint8),
        "absmax": torch.randint(256, (blocks,), dtype=torch.uint8) if nested else torch.rand(blocks),
        "blocksize": blocksize, "nested_blocksize": 4, "quant_type": "nf4", "rows": rows, "cols": cols, "dtype": dtype,
    }  # fmt: skip
    if nested:
        given_ |= {"nested_absmax": torch.rand(-(-blocks // 4)), "nested_code": torch.linspace(-1, 1, 256)}
        given_ |= {"offset": torch.tensor(0.3)}
    return QuantizedWeight(dequantize_4bit, [on_device(value) for value in dequantize_4bit.order(given_ | others)])


@given(st.data())
def test_the_product_is_rounded_once(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    T, R = data.draw(st.sampled_from([1, 3, 16, 17, 64])), data.draw(st.sampled_from([0, 4, 16, 24]))
    blocksize = data.draw(st.sampled_from([32, 64, 128, 4096]))
    N, K = data.draw(st.sampled_from([1, 40, 64, 130])), data.draw(st.sampled_from([8, 64, 200, 520, 1064]))
    dtype = data.draw(st.sampled_from([HALF, f32]))
    quant_type = data.draw(st.sampled_from(["nf4", "fp4"]))
    weight = quantized(N, K, data.draw(st.booleans()), blocksize=blocksize, quant_type=quant_type)
    x, bias = torch.randn(T, K, dtype=HALF, device=DEVICE), torch.randn(N, device=DEVICE)
    low = (torch.randn(T, R), torch.randn(N, R).t()) if R else None
    low = None if low is None else (low[0].to(DEVICE, HALF), low[1].to(DEVICE, HALF))
    assert gemv_4bit.serves(weight, x, low, bias)
    with guarded_memory() as check:
        y = gemv_4bit.product(x, weight, low, bias, dtype)
    check()
    truth = x.double() @ weight.to(HALF).double().t() + bias.double()
    assert_rounded(y, truth if low is None else truth + low[0].double() @ low[1].double(), dtype)
    assert torch.equal(y, gemv_4bit.product(x, weight, low, bias, dtype))


@pytest.mark.parametrize("dtype", [f16, bf16] if DEVICE.type == "cuda" else [f16])
@pytest.mark.parametrize("nested", [False, True])
def test_the_product_uses_the_exact_dequantized_values(dtype: torch.dtype, nested: bool) -> None:
    weight = quantized(70, 192, nested, dtype)
    for first in (0, 64, 128):
        x = torch.eye(192, dtype=dtype, device=DEVICE)[first : first + 64]
        columns = weight.to(dtype)[:, first : first + 64]
        assert torch.equal(gemv_4bit.product(x, weight, None, None, dtype).t(), columns)
        assert torch.equal(gemv_4bit.product(x[5:6], weight, None, None, dtype)[0], columns[:, 5])


@pytest.mark.parametrize(
    ("rows", "cols", "weight"),
    [(65, 64, {}), (4, 68, {}), (4, 64, {"dtype": f32})],
    ids=["more rows", "rows that end within a word", "a wider dtype"],
)
def test_unsupported_operands_are_rejected(rows: int, cols: int, weight: dict[str, Any]) -> None:
    given_ = quantized(8, cols, False, **weight)
    assert not gemv_4bit.serves(given_, torch.zeros(rows, cols, dtype=given_.dtype, device=DEVICE), None, None)


def test_small_weights_are_dequantized_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    weight = quantized(8, 64, False)
    x = torch.zeros(4, 64, dtype=HALF, device=DEVICE)
    assert not gemv_4bit.serves(weight, x, None, None)
    assert gemv_4bit.serves(weight, x[:1], None, None)


@pytest.mark.parametrize(("tokens", "launched"), [(1, "one_row_kernel"), (5, "few_rows_kernel")])
def test_a_lora_layer_with_few_tokens_dequantizes_no_matrix(tokens: int, launched: str) -> None:
    torch.manual_seed(0)
    scheme = scheme_of(HALF)
    x = on_device(torch.randn(1, tokens, 64, dtype=HALF))
    given_ = complete(lora_linear, {"x": x, **layer(scheme, 96, 64, 4, True), **scheme.attributes()})
    weight = quantized(96, 64, True)
    names = lora_linear.names
    weight_of = DerivedArgument("weight", None, dequantize_4bit, quantized=True)
    values = [None if name == "weight" else on_device(given_[name]) for name in names]
    with torch.no_grad(), launches() as found:
        site, given = call_site(lora_linear, values, [(weight_of, weight.values)])
        y = site(*given)[0]
    assert launched in found
    assert "kernel" not in found, "the kernel that decodes"
    whole = lora_linear(**{**given_, "x": x, "weight": weight.to(HALF)})
    assert (y - whole).abs().max() <= 4 * torch.finfo(HALF).eps * whole.abs().max()
