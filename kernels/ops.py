"""Every semantic op of fastlora, by name."""

from fastlora.kernels.formulas.dequantize import dequantize_4bit
from fastlora.kernels.formulas.dora import dora_add, dora_linear, dora_norm
from fastlora.kernels.formulas.dropout import dropout
from fastlora.kernels.formulas.glu import glu
from fastlora.kernels.formulas.layer_norm import add_layer_norm, layer_norm
from fastlora.kernels.formulas.linear_cross_entropy import linear_cross_entropy
from fastlora.kernels.formulas.lora_experts import lora_experts
from fastlora.kernels.formulas.lora_group import lora_group
from fastlora.kernels.formulas.lora_linear import lora_add, lora_linear
from fastlora.kernels.formulas.lora_mlp import lora_mlp
from fastlora.kernels.formulas.rms_norm import add_rms_norm, rms_norm
from fastlora.kernels.formulas.rotary import rotary, rotary_group

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
    "lora_experts",
    "lora_group",
    "lora_linear",
    "lora_mlp",
    "rms_norm",
    "rotary",
    "rotary_group",
]
