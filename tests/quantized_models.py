"""Tiny LoRA models with linear layers in bitsandbytes' 4 or 8 bits, and the same models dequantized."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES
from torch import nn

from fastlora.tools.zoo.quantize import dequantize_layers, four_bit_layer

WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
"""Multiples of all tested block sizes, since bitsandbytes 0.50's CPU kernel decodes others incorrectly."""


@dataclass(frozen=True)
class Format:
    """How weights are stored: see `bitsandbytes.nn.Params4bit`; `quant_type` may also be "int8"."""

    quant_type: str = "nf4"
    nested: bool = True
    blocksize: int = 64
    storage: torch.dtype = torch.uint8
    compute: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32

    def layer(self, linear: nn.Linear) -> nn.Module:
        """Return a quantized layer with the weights of a linear one."""
        linear.requires_grad_(False)
        if self.quant_type != "int8":
            options = {"quant_type": self.quant_type, "blocksize": self.blocksize, "compress_statistics": self.nested}
            return four_bit_layer(linear, self.compute, self.storage, **options)
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        layer: Any = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        layer.weight = bnb.nn.Int8Params(linear.weight.data.half(), requires_grad=False, has_fp16_weights=False)
        layer.bias = linear.bias
        return layer.to(linear.weight.device)


def build(family: str, kept: Format, device: str = "cpu", adapters: torch.dtype = torch.float32, **lora: Any) -> Any:
    """Build a PEFT model on quantized layers; neither A nor B is zero, so that no gradient is."""
    import transformers

    name, settings = FAMILIES[family]
    model_class = getattr(transformers, name)
    torch.manual_seed(0)
    extra = {"head_dim": 32} if "head_dim" in settings else {}
    config = model_class.config_class(**settings | WIDTHS | extra)
    for dropout in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    model = model_class(config).to(device, kept.dtype)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            model.set_submodule(name, kept.layer(module))
    setattr(model, "is_loaded_in_8bit" if kept.quant_type == "int8" else "is_loaded_in_4bit", True)
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}))
    return fill(model, adapters)


def fill(model: Any, dtype: torch.dtype = torch.float32) -> Any:
    """Cast the model's adapters to `dtype`, set every B to random values, and return the model."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def decoded(model: nn.Module) -> nn.Module:
    """Return a copy of the model with plain linear layers of the dequantized weights, in float32."""
    return dequantize_layers(copy.deepcopy(model)).float()
