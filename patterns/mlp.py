"""Gated linear units, and the gated MLP with LoRA on its three projections."""

from fastlora.graph.fake_values import same_shape
from fastlora.kernels import ops
from fastlora.match.dsl import Constant, cast, either, gelu, gelu_tanh, raised, silu, widened
from fastlora.match.rule import dtype_of, fuse, rule, tag_of
from fastlora.patterns.gated import gating, why_not

ACTIVATIONS = {
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}
"""The activations of gated units, by the op's name for them."""


@rule(ops.glu, anchor=gating, attrs={"activation": tag_of("activation"), "out_dtype": dtype_of()})
def glu(gate, up):
    g = widened(gate)
    activated = either(**{name: activation(g) for name, activation in ACTIVATIONS.items()}).named("activation")
    return cast(cast(activated) * widened(up))


@glu.where
def _operands_agree(match):
    gate, up = match.tensor("gate"), match.tensor("up")
    return (same_shape(gate, up) and gate.dtype == up.dtype) or "gate and up differ in shape or dtype"


@glu.otherwise
def _why_not(view, node):
    return why_not(view, node, covered=ACTIVATIONS)


@fuse(ops.lora_mlp, benefit=3)
def lora_mlp(
    x,
    base_dtype: Constant,
    lora_dtype: Constant,
    proj_dtype: Constant,
    hidden_dtype: Constant,
    out_dtype: Constant,
):
    """The three projections have equal base and adapter dtypes, gate and up also equal output dtypes.

    Adapter dropout is not supported: it would apply to the hidden activation inside the op.
    """
    common = {"base_dtype": base_dtype, "lora_dtype": lora_dtype, "x_dropped": None, "seed": None, "dropout": None}
    gate = raised(ops.lora_linear, "gate_", x=x, out_dtype=proj_dtype, **common)
    up = raised(ops.lora_linear, "up_", x=x, out_dtype=proj_dtype, **common)
    product = raised(ops.glu, gate=gate, up=up, out_dtype=hidden_dtype)
    return raised(ops.lora_linear, "down_", x=product, out_dtype=out_dtype, **common)


RULES = [glu, lora_mlp]
