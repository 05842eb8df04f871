"""The output head and the cross-entropy on it, so that logits need not exist all at once."""

from torch import fx

from fastlora.graph.fake_values import known_equal, known_less, meta
from fastlora.graph.view import View
from fastlora.kernels import ops
from fastlora.match.dsl import Constant, Op, Opt, Param, Scalar, either, linear, tanh, widened
from fastlora.match.rule import Match, dtype_of, rule


def on_a_vocabulary(view: View, node: fx.Node) -> bool:
    """A cross-entropy whose logits come from a linear layer and are larger than what goes into it."""
    term = view.term(node)
    if term is None or term.op != "cross_entropy":
        return False
    while term is not None and term.op != "linear":
        term = view.term(term.args.get("input"))
    weight = meta(term.args["weight"]) if term is not None else None
    return weight is not None and weight.dim() == 2 and known_less(weight.shape[1], weight.shape[0])


def _scale(match: Match) -> float:
    if match.tag("scaled") == "divided":
        return 1.0 / match.value("_divisor")
    return match.value("_factor") if match.tag("scaled") == "multiplied" else 1.0


@rule(
    ops.linear_cross_entropy,
    anchor=on_a_vocabulary,
    benefit=2,
    attrs={"scale": _scale, "z_loss": 0.0, "base_dtype": dtype_of("logits"), "logits_dtype": dtype_of()},
)
def linear_cross_entropy(
    x,
    weight: Param(2),
    bias: Opt[Param(1)],
    labels,
    _factor: Scalar,
    _divisor: Scalar,
    ignore_index: Constant,
    reduction: Constant,
    label_smoothing: Constant,
    softcap: Scalar = 0.0,
):
    logits = linear(x, weight, bias).named("logits")
    scaled = either(multiplied=logits * _factor, divided=logits / _divisor, plain=logits).named("scaled")
    capped = either(capped=tanh(widened(scaled) / softcap) * softcap, plain=scaled).named("capped")
    read = widened(either(flat=Op("reshape", input=widened(capped)), plain=capped)).named("read")
    return Op(
        "cross_entropy",
        input=read,
        target=labels,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


@linear_cross_entropy.where
def _labels_are_indices(match):
    return not match.tensor("labels").is_floating_point() or "the labels are probabilities"


@linear_cross_entropy.where
def _numbers_are_usable(match):
    """The scale is the divisor's inverse, and a cap of zero or less is no cap."""
    divisor, cap = match.value("_divisor"), match.value("softcap")
    divides = match.tag("scaled") != "divided" or (isinstance(divisor, (int, float)) and divisor != 0)
    caps = match.tag("capped") != "capped" or (isinstance(cap, (int, float)) and cap > 0)
    return (divides and caps) or "the logits' divisor or cap is symbolic or not positive"


@linear_cross_entropy.where
def _classes_are_last(match):
    read, logits = match.tensor("read"), match.tensor("logits")
    last = read.dim() == 2 and known_equal(read.shape[-1], logits.shape[-1])
    return (last and match.tensor("labels").dim() == 1) or "the classes are not the last of two dimensions"


@linear_cross_entropy.where
def _head_is_a_vocabulary(match):
    classes, width = match.tensor("weight").shape
    return known_less(width, classes) or f"{classes} logits are no more than the {width} values that they come from"


RULES = [linear_cross_entropy]
