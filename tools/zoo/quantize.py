"""Replacing linear layers by bitsandbytes' 4-bit layers, and back."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

BLOCKSIZES = (64, 32)
"""Candidate block sizes, by preference. The size must divide a layer's in_features, because bitsandbytes 0.50's CPU
kernel dequantizes other weights wrongly; layers that neither divides are not quantized."""


def four_bit_layer(
    linear: nn.Linear, compute_dtype: torch.dtype, quant_storage: torch.dtype = torch.uint8, **options: Any
) -> nn.Module:
    """Return a `Linear4bit` with the weight of a linear layer; `options` go to `bitsandbytes.nn.Params4bit`."""
    import bitsandbytes as bnb

    sizes = linear.in_features, linear.out_features, linear.bias is not None
    layer: Any = bnb.nn.Linear4bit(*sizes, compute_dtype=compute_dtype, quant_storage=quant_storage)
    weight = linear.weight.data
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_storage=quant_storage, module=layer, **options)
    layer.bias = linear.bias
    return layer.to(weight.device)


def quantize_layers(base: Any, names: list[str]) -> Any:
    """Replace the named linear layers by NF4 layers with double quantization, as loading in 4 bits does."""
    for name in names:
        linear = base.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            continue
        size = next((size for size in BLOCKSIZES if linear.in_features % size == 0), None)
        if size is not None:
            layer = four_bit_layer(linear, linear.weight.dtype, blocksize=size, quant_type="nf4")
            base.set_submodule(name, layer)
    base.is_loaded_in_4bit = True
    return base


def dequantize_layers(model: Any) -> Any:
    """Replace 4-bit layers by linear layers with the dequantized weights."""
    bnb: Any = sys.modules.get("bitsandbytes")
    if bnb is None:  # then no module can be one of its layers
        return model
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, weight.device)
            linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), module.bias
            model.set_submodule(name, linear)
    return model
