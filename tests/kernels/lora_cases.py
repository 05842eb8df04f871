"""Parameters of LoRA layers to test the ops with, in the mixtures of dtypes that occur with PEFT."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from op_cases import DEVICE, bf16, f16, f32, f64
from op_precision import tensors

from fastlora.kernels.core.implementations import restricted


class Scheme(NamedTuple):
    """The dtypes in which tensors are stored, and in which base layer and adapter compute."""

    x: torch.dtype
    weight: torch.dtype
    adapter: torch.dtype
    base: torch.dtype
    lora: torch.dtype
    out: torch.dtype

    def attributes(self) -> dict[str, torch.dtype]:
        return {"base_dtype": self.base, "lora_dtype": self.lora, "out_dtype": self.out}


SCHEMES = {
    "float32": Scheme(f32, f32, f32, f32, f32, f32),
    "bfloat16": Scheme(bf16, bf16, bf16, bf16, bf16, bf16),
    "float16": Scheme(f16, f16, f16, f16, f16, f16),
    "float32 adapters on bfloat16": Scheme(bf16, bf16, f32, bf16, f32, bf16),
    "autocast": Scheme(f32, f32, f32, bf16, bf16, bf16),
    "autocast to float16": Scheme(f32, f32, f32, f16, f16, f16),
    "autocast of a bfloat16 model": Scheme(bf16, bf16, f32, bf16, bf16, bf16),
    "bfloat16 products in a float32 stream": Scheme(f32, bf16, f32, bf16, f32, f32),
    "autocast in a float32 stream": Scheme(f32, bf16, f32, bf16, bf16, f32),
    "float16 autocast in a float32 stream": Scheme(f32, f16, f32, f16, f16, f32),
}


@st.composite
def schemes(draw: st.DrawFn) -> Scheme:
    """Draw one of the schemes that the implementation under test supports."""
    return draw(st.sampled_from([scheme for scheme in SCHEMES.values() if served(scheme)]))


def served(scheme: Scheme) -> bool:
    """Return whether the implementation under test supports these dtypes: kernels require one for both paths."""
    if restricted.to != "triton":
        return True
    return scheme.base == scheme.lora and (DEVICE.type == "cuda" or bf16 not in scheme)


def scheme_of(dtype: Scheme | torch.dtype) -> Scheme:
    """Return a scheme; for a dtype, the one with that dtype for everything."""
    return dtype if isinstance(dtype, Scheme) else Scheme(*[dtype] * 6)


def layer(scheme: Scheme, n: int, k: int, rank: int, biases: bool = True) -> dict[str, Any]:
    """Return parameters of a LoRA layer, B not zero, scaled so that products are of the size of their inputs."""

    def randn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return (torch.randn(shape, dtype=f64) * shape[-1] ** -0.5).to(dtype)

    return {
        "weight": randn(n, k, dtype=scheme.weight),
        "bias": randn(n, dtype=scheme.weight) if biases else None,
        "lora_a": randn(rank, k, dtype=scheme.adapter),
        "lora_b": randn(n, rank, dtype=scheme.adapter),
        "lora_bias": randn(n, dtype=scheme.adapter) if biases else None,
        "scaling": 2.83,
    }


@st.composite
def layers(draw: st.DrawFn, scheme: Scheme, n: int, k: int, rank: int) -> dict[str, Any]:
    """Draw parameters with any layouts and magnitudes; either bias may be missing."""
    return {
        "weight": draw(tensors((n, k), scheme.weight)),
        "bias": draw(tensors((n,), scheme.weight)) if draw(st.booleans()) else None,
        "lora_a": draw(tensors((rank, k), scheme.adapter)),
        "lora_b": draw(tensors((n, rank), scheme.adapter)),
        "lora_bias": draw(tensors((n,), scheme.adapter)) if draw(st.booleans()) else None,
        "scaling": draw(st.sampled_from([1.0, 0.5, 2.83, 16.0])),
    }
