"""Gated linear units, and the gated MLP whose three projections carry adapters."""

from fastlora.kernels import ops
from fastlora.metadata import meta, same_shape
from fastlora.pattern import cast, either, gelu, gelu_tanh, raised, silu, widened
from fastlora.rule import Match, dtype_of, fuse, rule
from fastlora.view import View

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
PROJECTIONS = ("gate", "up", "down")


def gating(view: View, node) -> bool:
    """An activation that multiplies another value of its shape."""
    term = view.term(node)
    if term is None or term.op not in ACTIVATIONS:
        return False
    products = [t for user in view.users(node) if (t := view.term(user)) is not None and t.op == "mul"]
    factors = [meta(factor) for t in products for factor in t.args.values() if view.producer(factor) is not node]
    activated = meta(node)
    return any(f is not None and activated is not None and same_shape(f, activated) for f in factors)


@rule(ops.glu, anchor=gating, attrs={"activation": lambda match: match.tag("activation"), "out_dtype": dtype_of()})
def glu(gate, up):
    g = widened(gate)
    activated = either(silu=silu(g), gelu=gelu(g), gelu_tanh=gelu_tanh(g)).named("activation")
    return cast(cast(activated) * widened(up))


@glu.where
def _operands_agree(match):
    gate, up = match.tensor("gate"), match.tensor("up")
    return (same_shape(gate, up) and gate.dtype == up.dtype) or "gate and up differ in shape or dtype"


def _common(name: str):
    """A dtype that all three projections share."""
    return lambda match: match.value(f"gate_{name}")


@fuse(
    ops.lora_mlp,
    benefit=3,
    attrs={
        "base_dtype": _common("base_dtype"),
        "lora_dtype": _common("lora_dtype"),
        "proj_dtype": _common("out_dtype"),
        "hidden_dtype": lambda match: match.value("out_dtype"),
        "out_dtype": lambda match: match.value("down_out_dtype"),
    },
)
def lora_mlp(x):
    """Without adapter dropout: a mask on the hidden product would have to be drawn between the projections."""
    gate = raised(ops.lora_linear, "gate_", x=x, x_dropped=None, seed=None)
    up = raised(ops.lora_linear, "up_", x=x, x_dropped=None, seed=None)
    product = raised(ops.glu, gate=gate, up=up)
    return raised(ops.lora_linear, "down_", x=product, x_dropped=None, seed=None)


@lora_mlp.where
def _dtypes_agree(match: Match):
    for name in ("base_dtype", "lora_dtype"):
        if len({match.value(f"{projection}_{name}") for projection in PROJECTIONS}) > 1:
            return f"its projections differ in {name}"
    return match.value("gate_out_dtype") == match.value("up_out_dtype") or "gate and up differ in dtype"


RULES = [glu, lora_mlp]
