"""Every semantic op of fastlora, by name."""

from fastlora.kernels.dequantize import dequantize_4bit
from fastlora.kernels.dora import dora_add, dora_linear, dora_norm
from fastlora.kernels.dropout import dropout
from fastlora.kernels.glu import glu
from fastlora.kernels.layer_norm import add_layer_norm, layer_norm
from fastlora.kernels.linear_cross_entropy import linear_cross_entropy
from fastlora.kernels.lora_group import lora_group
from fastlora.kernels.lora_grouped import lora_grouped
from fastlora.kernels.lora_linear import lora_add, lora_linear
from fastlora.kernels.lora_mlp import lora_mlp
from fastlora.kernels.rms_norm import add_rms_norm, rms_norm
from fastlora.kernels.rotary import rotary, rotary_group

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "dequantize_4bit",
    "dora_add",
    "dora_linear",
    "dora_norm",
    "dropout",
    "glu",
    "layer_norm",
    "linear_cross_entropy",
    "lora_add",
    "lora_group",
    "lora_grouped",
    "lora_linear",
    "lora_mlp",
    "rms_norm",
    "rotary",
    "rotary_group",
]
