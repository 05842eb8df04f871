"""The output head fused with a loss or log probabilities of its logits, without materializing all logits."""

from torch import fx

from fastlora.graph.fake_values import known_equal, known_less, meta
from fastlora.graph.view import View
from fastlora.kernels import ops
from fastlora.match.dsl import (
    Constant,
    Opt,
    Param,
    Pattern,
    Scalar,
    cross_entropy,
    either,
    gather,
    linear,
    log_softmax,
    reshape,
    squeeze,
    tanh,
    unsqueeze,
    widened,
)
from fastlora.match.rule import Match, dtype_of, rule

_NO_LABEL = -(2**31)
"""The ignore_index of losses that ignore no label."""


def _reads_a_vocabulary(view: View, value) -> bool:
    """Return whether a value is computed by a chain of operations from a linear layer with more outputs than inputs."""
    term = view.term(value)
    while term is not None and term.op != "linear":
        term = view.term(term.args.get("input"))
    weight = meta(term.args["weight"]) if term is not None else None
    return weight is not None and weight.dim() == 2 and known_less(weight.shape[1], weight.shape[0])


def on_a_vocabulary(view: View, node: fx.Node) -> bool:
    """Return whether a node is a cross-entropy over a vocabulary."""
    term = view.term(node)
    return term is not None and term.op == "cross_entropy" and _reads_a_vocabulary(view, term.args["input"])


def picks_log_probabilities(view: View, node: fx.Node) -> bool:
    """Return whether a node gathers entries of the log-softmax over a vocabulary."""
    term = view.term(node)
    source = view.term(term.args["input"]) if term is not None and term.op == "gather" else None
    return source is not None and source.op == "log_softmax" and _reads_a_vocabulary(view, source.args["input"])


def _read_logits(x: Pattern, weight, bias, factor: Pattern, divisor: Pattern, softcap: Pattern) -> Pattern:
    """Return the pattern of a loss's input: logits that are optionally scaled, soft-capped, widened and flattened."""
    logits = linear(x, weight, bias).named("logits")
    scaled = either(multiplied=logits * factor, divided=logits / divisor, plain=logits).named("scaled")
    capped = either(capped=tanh(widened(scaled) / softcap) * softcap, plain=scaled).named("capped")
    return widened(either(flat=reshape(widened(capped)), plain=capped)).named("read")


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
    return cross_entropy(
        _read_logits(x, weight, bias, _factor, _divisor, softcap),
        labels,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


@rule(
    ops.linear_cross_entropy,
    anchor=picks_log_probabilities,
    benefit=2,
    attrs={
        "scale": _scale,
        "ignore_index": _NO_LABEL,
        "reduction": "none",
        "label_smoothing": 0.0,
        "z_loss": 0.0,
        "base_dtype": dtype_of("logits"),
        "logits_dtype": dtype_of(),
    },
    result=lambda loss, labels: -loss.view_as(labels),
)
def token_log_probabilities(
    x,
    weight: Param(2),
    bias: Opt[Param(1)],
    labels,
    _factor: Scalar,
    _divisor: Scalar,
    softcap: Scalar = 0.0,
):
    """The log probability of each label, as in preference and policy losses: the negative unreduced cross-entropy."""
    logits = _read_logits(x, weight, bias, _factor, _divisor, softcap)
    return squeeze(gather(log_softmax(logits), unsqueeze(labels)))


@linear_cross_entropy.where
def _labels_are_indices(match):
    return not match.tensor("labels").is_floating_point() or "the labels are probabilities"


@linear_cross_entropy.where
@token_log_probabilities.where
def _numbers_are_usable(match):
    """The scale is the inverse of the divisor; the op takes a softcap of zero or less as none."""
    divisor, cap = match.value("_divisor"), match.value("softcap")
    divides = match.tag("scaled") != "divided" or (isinstance(divisor, (int, float)) and divisor != 0)
    caps = match.tag("capped") != "capped" or (isinstance(cap, (int, float)) and cap > 0)
    return (divides and caps) or "the logits' divisor or cap is symbolic or not positive"


@linear_cross_entropy.where
def _classes_are_last(match):
    read, logits = match.tensor("read"), match.tensor("logits")
    last = read.dim() == 2 and known_equal(read.shape[-1], logits.shape[-1])
    return (last and match.tensor("labels").dim() == 1) or "the classes are not the last of two dimensions"


@token_log_probabilities.where
def _one_label_for_each_row(match):
    """`gather` also accepts fewer labels than there are rows, and then reads the first rows."""
    read, labels, logits = (match.tensor(name) for name in ("read", "labels", "logits"))
    rows = len(labels.shape) == read.dim() - 1 and all(map(known_equal, labels.shape, read.shape))
    return (rows and known_equal(read.shape[-1], logits.shape[-1])) or "the labels are not one for each row of logits"


@linear_cross_entropy.where
@token_log_probabilities.where
def _head_is_a_vocabulary(match):
    classes, width = match.tensor("weight").shape
    return known_less(width, classes) or f"{classes} logits are no more than the {width} values that they come from"


RULES = [linear_cross_entropy, token_log_probabilities]
