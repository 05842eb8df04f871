"""Loading models in 4 bits, for every command that does."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from fastlora.tools.problems import UsageError

FORMATS = ("nf4", "fp4")


def check_installed(option: str) -> None:
    """
    Raises:
        UsageError: that names the option, if what quantises is missing.
    """
    if find_spec("bitsandbytes") is None:
        raise UsageError(f"{option}: needs bitsandbytes; run: pip install 'fastlora-fx[quant]'")


def four_bits(compute: torch.dtype, quant_type: str = "nf4") -> Any:
    """transformers' configuration of weights that are quantised twice, with products in the dtype `compute`."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
