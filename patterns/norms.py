"""RMSNorm and LayerNorm, alone, and after a residual addition with or without dropout.

Models differ in four ways, all arguments of the op: whether the weight is stored minus 1 (`offset`), whether the
normalized value is rounded before the multiplication by the weight (`norm_dtype`), the dtype in which the weight is
used (`scale_dtype`), and the dtype of the result (`out_dtype`).

Dropout of either operand is fused like LoRA's, on a GPU: see `patterns/lora.py`.
"""

import torch
from torch import fx

from fastlora.graph.fake_values import known_equal, same_shape
from fastlora.graph.view import View
from fastlora.kernels import ops
from fastlora.match.dsl import (
    Constant,
    Op,
    Opt,
    Param,
    Pattern,
    Scalar,
    cast,
    either,
    mean,
    raised,
    rsqrt,
    seeded,
    sqrt,
    var,
    widened,
)
from fastlora.match.rule import Match, dtype_of, fuse, rule
from fastlora.patterns.lora import is_cheap_to_recompute
from fastlora.patterns.other_norms import L2, divides_its_own, why_not


def _offset(match: Match) -> float:
    return 1.0 if match.tag("scale") == "distance" else 0.0


def _scale(weight: Pattern) -> Pattern:
    return either(distance=1.0 + widened(weight), plain=cast(weight)).named("scale")


def _last_dimension(match: Match) -> bool | str:
    """Check that the weight has one entry for each normalized element."""
    if match.value("weight") is None:
        return True
    fits = known_equal(match.tensor("weight").shape[-1], match.tensor("x").shape[-1])
    return fits or "weight and x differ"


def _summands(view: View, value) -> list:
    """Return the operands of a sum, [] for any other value."""
    term = view.term(value)
    return list(term.args.values()) if term is not None and term.op == "add" else []


def normalizer(view: View, node: fx.Node) -> bool:
    """Return whether a node is what a norm divides by: `rsqrt`, `sqrt` of a mean and eps, or the norm of a value that
    is divided by it."""
    if divides_its_own(view, node):
        return True
    term = view.term(node)
    if term is None or term.op != "sqrt":
        return term is not None and term.op == "rsqrt"
    terms = map(view.term, _summands(view, term.args["input"]))
    return any(each is not None and each.op in ("mean", "var") for each in terms)


@rule(
    ops.rms_norm,
    anchor=normalizer,
    attrs={
        "offset": _offset,
        "compute_dtype": dtype_of("power"),
        "norm_dtype": dtype_of("n"),
        "scale_dtype": dtype_of("scale", torch.float32),
        "out_dtype": dtype_of(),
    },
)
def rms_norm(x, weight: Opt[Param(1)], eps: Scalar):
    h = widened(x).named("h")
    power = mean(h**2).named("power") + eps
    root = either(reciprocal=1.0 / sqrt(power), rsqrt=rsqrt(power))
    read = either(h=h, x=x)
    n = cast(either(widened=read * root, divided=read / sqrt(power))).named("n")
    together = (read * root * _scale(weight)).named("n")  # in any order, as in x * (root * weight)
    return cast(either(weighted=n * _scale(weight), together=together, bare=n))


@rms_norm.where
def _weight_fits(match):
    return _last_dimension(match)


@rms_norm.otherwise
def _why_not(view: View, root: fx.Node) -> str | None:
    term = view.term(root)
    power = term.args["input"] if term is not None else root
    values = [power, *_summands(view, power)]
    is_sum = any(getattr(view.producer(value), "target", None) in ("sum", torch.sum) for value in values)
    return L2 if is_sum else why_not(view, root)


def _torch_eps(match: Match) -> float:
    eps = match.value("_eps")
    return torch.finfo(_wide(match)).eps if eps is None else eps


def _wide(match: Match) -> torch.dtype:
    return torch.promote_types(match.dtype("x"), torch.float32)


@rule(
    ops.rms_norm,
    anchor="torch_rms_norm",
    attrs={
        "eps": _torch_eps,
        "offset": 0.0,
        "compute_dtype": _wide,
        "norm_dtype": _wide,
        "scale_dtype": _wide,
        "out_dtype": dtype_of(),
    },
)
def torch_rms_norm(x, weight: Opt, _shape: Constant, _eps: Constant):
    return Op("torch_rms_norm", input=x, normalized_shape=_shape, weight=weight, eps=_eps)


@torch_rms_norm.where
def _one_dimension(match):
    return len(match.value("_shape")) == 1 or "it normalizes several dimensions"


@rule(ops.layer_norm, anchor="layer_norm", attrs={"out_dtype": dtype_of()})
def layer_norm(x, weight: Opt, bias: Opt, eps: Scalar, _shape: Constant):
    return Op("layer_norm", input=x, normalized_shape=_shape, weight=weight, bias=bias, eps=eps)


@layer_norm.where
def _last_dimension_only(match):
    return len(match.value("_shape")) == 1 or "it normalizes several dimensions"


@rule(ops.layer_norm, anchor=normalizer, attrs={"out_dtype": dtype_of()})
def written_layer_norm(x, weight: Opt[Param(1)], eps: Scalar):
    """LayerNorm spelled out, with a weight and no bias."""
    h = widened(x).named("h")
    centred = h - mean(h)
    power = either(squares=mean((h - mean(h)) ** 2), var=var(h)) + eps
    n = either(multiplied=centred * rsqrt(power), divided=centred / sqrt(power)).named("n")
    return cast(either(weighted=n * widened(weight), bare=n))


@written_layer_norm.where
def _computes_wide(match):
    wide = torch.promote_types(match.dtype("x"), torch.float32)
    return match.dtype("h") == wide or f"its statistics are in {match.dtype('h')}"


@written_layer_norm.where
def _written_weight_fits(match):
    return _last_dimension(match)


def _sum(residual: Pattern, x: Pattern, p: Pattern) -> Pattern:
    """Return the pattern of a residual addition, optionally with dropout of either operand, which the op applies."""
    dropped = seeded("seed", x, p, where=is_cheap_to_recompute)
    return either(seeded=residual + dropped, plain=residual + x)


@fuse(ops.add_rms_norm)
def add_rms_norm(residual, x, dropout: Scalar = None):
    total = _sum(residual, x, dropout)
    return raised(ops.rms_norm, x=total), total


@fuse(ops.add_layer_norm)
def add_layer_norm(residual, x, dropout: Scalar = None):
    total = _sum(residual, x, dropout)
    return raised(ops.layer_norm, x=total), total


@add_rms_norm.where
@add_layer_norm.where
def _same_operands(match):
    """The op neither broadcasts nor promotes, since the gradient of each operand is that of the sum."""
    residual, x = match.tensor("residual"), match.tensor("x")
    return (same_shape(residual, x) and residual.dtype == x.dtype) or "the operands of the sum differ in shape or dtype"


RULES = [rms_norm, torch_rms_norm, layer_norm, written_layer_norm, add_rms_norm, add_layer_norm]
