"""Kernels index tensors of more than 2^31 elements correctly.

All rows but the last are zeros, so results of the last rows, and gradients of parameters, equal those of these rows
alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import DEVICE

from fastlora.kernels.formulas import dropout as dropout_module
from fastlora.kernels.ops import dequantize_4bit, dropout
from fastlora.tools.bench.accuracy import cotangents, flat, leaves
from fastlora.tools.bench.cases import Arguments, Case, cases
from fastlora.tools.bench.shapes import SHAPES

IMPLEMENTATIONS = ["triton"]
MEMORY = torch.cuda.get_device_properties(DEVICE).total_memory if DEVICE.type == "cuda" else 0
pytestmark = pytest.mark.skipif(MEMORY < 100 << 30, reason="needs 100 GiB of a GPU's memory")

TAIL = 333
IGNORED = -100


def _cases(tokens: int) -> dict[str, Case]:
    found = [c for name in ("Qwen3-0.6B", "BERT-large") for c in cases(SHAPES[name], tokens, [16]) if c.grad_arguments]
    return {f"{c.op.name}, {c.place}": c for c in found}


def _width(case: Case) -> int:
    """Return the elements per token of the largest activation that is certain to exist."""
    sizes = case.sizes
    return max(sizes.get(name, 1) for name in ("H", "I", "K")) if "D" not in sizes else sizes["M"] * sizes["D"] // 2


def _tail(t: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return the part of an activation for the last tokens; other tensors are returned unchanged."""
    return t.narrow(list(t.shape).index(tokens), tokens - TAIL, TAIL) if tokens in t.shape else t


def _zeros_before(small: torch.Tensor, shape: torch.Size, tokens: int) -> torch.Tensor:
    if tokens not in shape:
        return small
    large = torch.zeros(shape, dtype=small.dtype, device=DEVICE)
    _tail(large, tokens).copy_(small)
    return large


def _pair(name: str, tokens: int) -> tuple[Arguments, Arguments]:
    """Return the arguments of the last tokens alone, and of all tokens."""
    made: list[torch.Tensor] = []
    generator = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        made.append((torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype))
        return made[-1].clone()

    def again(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
        return _zeros_before(made.pop(0), torch.Size(shape), tokens)

    small = _cases(TAIL)[name].arguments_from(randn, torch.bfloat16)
    large = _cases(tokens)[name].arguments_from(again, torch.bfloat16)
    for angles in ("cos", "sin"):
        if angles in small:
            small[angles] = _tail(large[angles], tokens)
    if "labels" in small:
        large["labels"].fill_(IGNORED)[-TAIL:] = small["labels"]
    return small, large


@pytest.mark.parametrize("name", _cases(TAIL))
def test_rows_beyond_2_to_the_31_elements(name: str) -> None:
    tokens = 2**31 // _width(_cases(TAIL)[name]) + TAIL
    small, large = _pair(name, tokens)
    op = _cases(TAIL)[name].op
    expected, found = flat(op(**small)), flat(op(**large))
    incoming = cotangents(expected)
    zeros = [_zeros_before(g, t.shape, tokens) for g, t in zip(incoming, found, strict=True)]
    wanted = leaves(small)
    of_small = torch.autograd.grad(expected, list(wanted.values()), incoming)
    of_large = torch.autograd.grad(found, list(leaves(large).values()), zeros)
    for label, value, truth in zip((*map(str, range(len(found))), *wanted), (*found, *of_large), (*expected, *of_small),
                                   strict=True):  # fmt: skip
        tail = _tail(value, tokens) if truth.shape != value.shape else value
        off = (tail.double() - truth.double()).norm() / truth.double().norm()
        assert off < 0.01, (
            f"{label}: {off:.3g}"
        )  # other tiles round intermediate results differently; wrong rows would be off by 1
        if tail is not value:
            rows = list(value.shape).index(tokens)
            assert (value.narrow(rows, 0, TAIL) == value.narrow(rows, 0, 1)).all()


def test_masks_beyond_2_to_the_31_elements() -> None:
    size, p = 2**31 + 5 * TAIL, 0.25
    x, seed = torch.ones(size, dtype=torch.bfloat16, device=DEVICE), torch.tensor([12345], device=DEVICE)
    found = dropout(x=x, base=None, seed=seed, p=p, out_dtype=torch.bfloat16)
    for start in (0, 2**31 - TAIL, size - TAIL):
        position = torch.arange(start, start + TAIL, device=DEVICE)
        kept = dropout_module.random_words(seed, position) >= dropout_module.threshold(p)
        assert torch.equal(found[start : start + TAIL] != 0, kept)


def test_weights_beyond_2_to_the_31_elements() -> None:
    rows, cols, block, nested = 2**17 + 256, 2**14, 64, 256
    generator = torch.Generator(DEVICE).manual_seed(0)

    def stored(n: int) -> torch.Tensor:
        return torch.randint(256, (n,), dtype=torch.uint8, device=DEVICE, generator=generator)

    given: dict[str, Any] = {
        "packed": stored(rows * cols // 2),
        "absmax": stored(rows * cols // block),
        "nested_absmax": torch.rand(rows * cols // block // nested, device=DEVICE, generator=generator),
        "nested_code": torch.linspace(-1, 1, 256, device=DEVICE),
        "offset": torch.tensor(0.3, device=DEVICE),
        "blocksize": block,
        "nested_blocksize": nested,
        "quant_type": "nf4",
        "rows": rows,
        "cols": cols,
        "dtype": torch.bfloat16,
    }
    decoded = dequantize_4bit(**given)
    last = cols // nested  # as many rows as fill whole blocks of either kind
    end = {
        "packed": given["packed"][-last * cols // 2 :],
        "absmax": given["absmax"][-last * cols // block :],
        "nested_absmax": given["nested_absmax"][-last * cols // block // nested :],
        "rows": last,
    }
    assert torch.equal(decoded[-last:], dequantize_4bit.reference(**(given | end)))
