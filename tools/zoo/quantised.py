"""Tiny models over bitsandbytes' 4-bit layers, and the same ones decoded."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

BLOCKSIZES = (64, 32)
"""Of which the first that a row holds a multiple of is taken: bitsandbytes 0.50's kernel for CPUs decodes others
wrongly, so rows that are multiples of none stay as they are."""


def four_bit_layer(
    linear: nn.Linear, compute: torch.dtype, quant_storage: torch.dtype = torch.uint8, **kept: Any
) -> nn.Module:
    """A quantised layer of a linear one; `kept` are further options of `bitsandbytes.nn.Params4bit`."""
    import bitsandbytes as bnb

    sizes = linear.in_features, linear.out_features, linear.bias is not None
    made: Any = bnb.nn.Linear4bit(*sizes, compute_dtype=compute, quant_storage=quant_storage)
    weight = linear.weight.data
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_storage=quant_storage, module=made, **kept)
    made.bias = linear.bias
    return made.to(weight.device)


def quantise(base: Any, names: list[str]) -> Any:
    """Puts NF4 layers, quantised twice, in the place of these linear layers, as where transformers loads in 4 bits."""
    for name in names:
        linear = base.get_submodule(name)
        size = next((size for size in BLOCKSIZES if isinstance(linear, nn.Linear) and not linear.in_features % size), 0)
        if not size:
            continue
        base.set_submodule(name, four_bit_layer(linear, linear.weight.dtype, blocksize=size, quant_type="nf4"))
    base.is_loaded_in_4bit = True
    return base


def decode(model: Any) -> Any:
    """Puts linear layers of the decoded weights in the place of 4-bit ones, of which there are none without their
    library."""
    bnb: Any = sys.modules.get("bitsandbytes")
    for name, module in list(model.named_modules()) if bnb is not None else ():
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, weight.device)
            linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), module.bias
            model.set_submodule(name, linear)
    return model
