"""Options for loading models in 4 bits."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from fastlora.tools.errors import UsageError

FORMATS = ("nf4", "fp4")


def check_bitsandbytes(option: str) -> None:
    """Raise `UsageError`, naming the option that needs it, if bitsandbytes is not installed."""
    if find_spec("bitsandbytes") is None:
        raise UsageError(f"{option}: needs bitsandbytes; run: pip install 'fastlora-fx[quant]'")


def four_bit_config(compute_dtype: torch.dtype, quant_type: str = "nf4") -> Any:
    """Return the transformers config for 4-bit weights with double quantization."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )
