"""Tiny models whose linear layers bitsandbytes keeps in 4 or 8 bits, with LoRA, and the same ones decoded."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import FAMILIES
from torch import nn

from fastlora.tools.zoo.quantised import decode, four_bit_layer

WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
"""Multiples of the block sizes that are tested: bitsandbytes 0.50's kernel for CPUs decodes others wrongly."""


@dataclass(frozen=True)
class Format:
    """How weights are kept: see `bitsandbytes.nn.Params4bit`; `quant_type` may also be "int8"."""

    quant_type: str = "nf4"
    nested: bool = True
    blocksize: int = 64
    storage: torch.dtype = torch.uint8
    compute: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32

    def layer(self, linear: nn.Linear) -> nn.Module:
        """A quantised layer of a linear one."""
        linear.requires_grad_(False)
        if self.quant_type != "int8":
            kept = {"quant_type": self.quant_type, "blocksize": self.blocksize, "compress_statistics": self.nested}
            return four_bit_layer(linear, self.compute, self.storage, **kept)
        sizes = linear.in_features, linear.out_features, linear.bias is not None
        made: Any = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        made.weight = bnb.nn.Int8Params(linear.weight.data.half(), requires_grad=False, has_fp16_weights=False)
        made.bias = linear.bias
        return made.to(linear.weight.device)


def build(family: str, kept: Format, device: str = "cpu", adapters: torch.dtype = torch.float32, **lora: Any) -> Any:
    """A PEFT model over quantised layers; neither A nor B is zero, so that every gradient is something."""
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
    """The same model with adapters of that dtype, of which no B is zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def decoded(model: nn.Module) -> nn.Module:
    """The same model with plain linear layers of the decoded weights, in float32."""
    return decode(copy.deepcopy(model)).float()
