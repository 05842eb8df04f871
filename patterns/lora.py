"""LoRA adapters: on a linear layer, on any other base layer, and several with a shared input.

PEFT casts the input to the adapter's dtype, applies dropout to it, and adds the scaled low-rank product to the base
layer's output. All dtypes are taken from the trace, since autocast may have changed them.

Dropout of the input is fused if its mask is cheap to recompute, which it is on a GPU: the graph then draws a seed
instead, and neither the mask nor the dropped-out input is saved. Otherwise it stays in the graph, with the random
numbers of eager mode, and the op takes both x and the dropped-out x.
"""

from typing import Any

import torch
from torch import fx

from fastlora.compat.dispatch import is_wrapper_subclass
from fastlora.graph.derived import DerivedValue, transposed
from fastlora.graph.fake_values import known_equal, known_less, meta, same_shape
from fastlora.graph.view import View
from fastlora.kernels import ops
from fastlora.kernels.formulas.dropout import is_cheap
from fastlora.match.dsl import Op, Opt, Param, Scalar, cast, dropout, either, kept, linear, scaled, seeded, widened
from fastlora.match.rule import GroupRule, Match, Rule, dtype_of, group, rule
from fastlora.patterns.candidates import Product, before, is_given, name_of, product

_REACH = 12


def _pair(view: View, node: fx.Node) -> tuple[Product, Product, list[fx.Node]] | None:
    """Return the products with B and with A that compute a node, and the nodes between them; None if it is no adapter.

    The rank has to be smaller than the input and the output. Between the products there may be copies, layout changes
    and scalings, with which the pair is still one linear map.
    """
    outer = product(view, node)
    inner, between = _first_product(view, outer.input) if outer is not None else (None, [])
    if outer is None or inner is None or inner.biased:
        return None
    low = _is_smallest(inner.out_features, inner.in_features, outer.out_features)
    return (outer, inner, between) if low else None


def _first_product(view: View, value: Any) -> tuple[Product | None, list[fx.Node]]:
    """Return the product that a value is a copy, layout or multiple of, and the nodes between the two."""
    between: list[fx.Node] = []
    while value is not None and (found := product(view, value)) is None and len(between) < _REACH:
        between.append(view.producer(value))
        value = before(view, value)
    return (found if value is not None else None), between


def _is_smallest(rank: Any, *sizes: Any) -> bool:
    return all(known_less(rank, size) for size in sizes)


def low_rank(view: View, node: fx.Node) -> bool:
    """Return whether a node is the second of two consecutive products with weights of low rank, or a sum with it."""
    term = view.term(node)
    added = list(term.args.values()) if term is not None and term.op == "add" else []
    products = (node, *(value for value in added if isinstance(value, DerivedValue)))
    return any(_pair(view, value) is not None for value in products)


def has_low_rank(match: Match, b: str = "lora_b"):
    """Return whether the rank of an adapter is smaller than its input and output."""
    (rank, columns), rows = match.tensor("lora_a").shape, match.tensor(b).shape[0]
    return _is_smallest(rank, columns, rows) or "the inner dimension is not the smallest"


def is_cheap_to_recompute(view: View, dropped: fx.Node) -> bool | str:
    """Return whether a kernel can recompute the mask, both for the input and for the result of a dropout."""
    term = view.term(dropped)
    source = term.args["input"] if term is not None else dropped
    values = dropped, source, _undropped(view, source)
    cheap = all(tensor is not None and is_cheap(tensor) for tensor in map(meta, values))
    return cheap or "no kernel on its device can recompute the mask"


def _fused_dropout(x, p):
    """Return the pattern of a dropout that becomes part of the op, on x in its own dtype or widened."""
    return seeded("seed", widened(x), p, where=is_cheap_to_recompute)


def _separate_dropout(x, p):
    """Return the pattern of a dropout that stays in the graph."""
    return kept("x_dropped", dropout(cast(x), p))


def _contribution(x, lora_a, lora_b, lora_bias, scaling, gain):
    """Return the pattern of the adapter's output, with scales anywhere but before a bias, which they would not scale.

    PEFT rounds the output to the dtype of a quantized base layer's output before the addition, and for some layers
    before scaling; the op rounds only the sum.
    """
    biased = linear(linear(x, lora_a).named("inner"), lora_b, lora_bias)
    inner = linear(scaled(x, scaling, gain, inside=True), lora_a).named("inner")
    plain = linear(scaled(inner, scaling, gain, inside=True), lora_b)
    return cast(scaled(cast(either(biased=biased, plain=plain)), scaling, gain))


def _times_gain(match: Match, value: Any) -> Any:
    """Return a parameter times the scalar parameters that scale the adapter."""
    gain = match.value("_gain")
    return value if gain is None or value is None else DerivedValue(torch.mul, (value, gain))


_ADAPTER = {
    "lora_b": lambda match: _times_gain(match, match.value("_lora_b")),
    "lora_bias": lambda match: _times_gain(match, match.value("_lora_bias")),
    "lora_dtype": dtype_of("inner"),
    "out_dtype": dtype_of(),
}
"""The `attrs` of an adapter beside a base layer."""


@rule(ops.lora_linear, anchor=low_rank, benefit=2, attrs={**_ADAPTER, "base_dtype": dtype_of("base")})
def lora_linear(
    x,
    weight: Param(2),
    bias: Opt[Param(1)],
    lora_a: Param(2),
    _lora_b: Param(2),
    _lora_bias: Opt[Param(1)],
    _gain: Opt,
    _p: Scalar = 0.0,
    scaling: Scalar = 1.0,
    dropout: Scalar = None,
):
    read = either(same=x, rounded=cast(x)).named("read")
    base = cast(linear(read, weight, bias).named("base"))  # the op does not round here
    adapted = either(seeded=_fused_dropout(x, dropout), dropped=_separate_dropout(x, _p), plain=cast(x))
    return cast(base + _contribution(adapted, lora_a, _lora_b, _lora_bias, scaling, _gain))


@lora_linear.where
def _base_is_rounded_once(match: Match):
    """The op casts x directly to the dtype that the base layer computes in."""
    direct = match.dtype("read") in (match.dtype("x"), match.dtype("base"))
    return direct or "the base's input is rounded to another dtype before it is read"


@rule(ops.lora_add, anchor=low_rank, benefit=2, attrs=_ADAPTER)
def lora_add(
    base,
    x,
    lora_a: Param(2),
    _lora_b: Param(2),
    _lora_bias: Opt[Param(1)],
    _gain: Opt,
    scaling: Scalar = 1.0,
    dropout: Scalar = None,
):
    """An adapter on any base layer: a quantized layer, a Conv1D, a layer that already has an adapter."""
    adapted = either(seeded=_fused_dropout(x, dropout), plain=cast(x))
    return cast(base + _contribution(adapted, lora_a, _lora_b, _lora_bias, scaling, _gain))


for _adapter in (lora_linear, lora_add):
    _adapter.where(lambda match: has_low_rank(match, "_lora_b"))


@lora_linear.otherwise
def _why_not(view: View, node: fx.Node) -> str | None:
    """Return why the products are not linear layers on plain tensors, or what is between them."""
    pair = _pair(view, node)
    if pair is None:
        return None
    outer, inner, between = pair
    for weight in (outer.weight, inner.weight):
        if is_wrapper_subclass(tensor := meta(weight)):
            return f"its weights are of the tensor subclass {type(tensor).__name__}, which no rule covers"
    if (computed_by := {outer.op, inner.op}) != {"linear"}:
        return f"its products are computed by {' and '.join(sorted(computed_by))}, which no rule covers"
    names = dict.fromkeys(name_of(view, each) for each in between if name_of(view, each) != "cast")
    return f"{', '.join(names)} between A and B, which no rule covers" if names else None


@lora_add.where
def _base_reads_the_same_input(match: Match):
    """An adapter has the input of its base layer; a sum of unrelated values is no adapter."""
    target = match.view.producer(_undropped(match.view, match.value("x")))
    frontier = [match.view.producer(match.value("base"))]
    for _ in range(8):
        if target in frontier:
            return True
        frontier = [match.view.producer(source) for node in frontier for source in node.all_input_nodes]
    return "the low-rank path reads another input than the base"


@lora_add.where
def _same_result_shape(match: Match):
    """The op returns the result's gradient as that of the base, so the sum must not broadcast it."""
    return same_shape(match.tensor("base"), match.tensor()) or "the base is broadcast"


def _undropped(view: View, x: fx.Node) -> fx.Node:
    """Return the adapter's input before casts and dropout."""
    term = view.term(x)
    while term is not None and term.op in ("cast", "dropout"):
        x = term.args["input"]
        term = view.term(x)
    return x


def merged_low_rank(view: View, node: fx.Node) -> bool:
    """Return whether a node is a linear layer whose weight is a sum with a product of low rank."""
    term = view.term(node)
    weight = view.term(term.args["weight"]) if term is not None and term.op == "linear" else None
    return weight is not None and weight.op == "add" and any(_is_delta(view, each) for each in weight.args.values())


def _is_delta(view: View, value: Any) -> bool:
    """Return whether a value is a product of two weights of low rank, possibly scaled, cast or transposed."""
    found, _ = _first_product(view, value)
    left = meta(found.input) if found is not None and is_given(view, found.input) else None
    return found is not None and left is not None and _is_smallest(found.in_features, found.out_features, left.shape[0])


def _factors(match: Match) -> tuple[Any, Any]:
    """Return A.T (K, R) and B (N, R) of the product B @ A, which is left @ right.T or the transpose of that."""
    left, right = match.value("_left"), match.value("_right")
    return (left, right) if match.tag("delta") == "transposed" else (right, left)


@rule(
    ops.lora_linear,
    anchor=merged_low_rank,
    benefit=2,
    attrs={
        "lora_a": lambda match: transposed(_factors(match)[0]),
        "lora_b": lambda match: _times_gain(match, _factors(match)[1]),
        "base_dtype": dtype_of("base"),
        "lora_dtype": dtype_of("delta"),
        "out_dtype": dtype_of(),
    },
)
def merged_lora(
    x,
    weight: Param(2),
    bias: Opt[Param(1)],
    _left: Param(2),
    _right: Param(2),
    _gain: Opt,
    scaling: Scalar = 1.0,
):
    """An adapter added to the weight in each call, `linear(x, W + s * B @ A)`; the op never computes that sum."""
    low = linear(_left, _right)
    delta = either(transposed=Op("transposed", input=scaled(low, scaling, _gain)), plain=low).named("delta")
    return cast(linear(x, weight + scaled(cast(delta), scaling, _gain), bias).named("base"))


@lora_linear.where
def _weight_has_both_sizes(match: Match):
    """A weight that broadcasts has no adapter of its own."""
    weight, a, b = match.tensor("weight"), match.tensor("lora_a"), match.tensor("_lora_b")
    fits = known_equal(weight.shape[0], b.shape[0]) and known_equal(weight.shape[1], a.shape[1])
    return fits or "the base weight and the adapter differ in shape"


@merged_lora.where
def _merged_weight_has_both_sizes(match: Match):
    fits = same_shape(match.tensor("weight"), match.tensor("delta"))
    return fits or "the base weight and the adapter differ in shape"


@merged_lora.where
def _has_the_range_of_float32(match: Match):
    """x @ A.T may be larger than B @ A."""
    return match.dtype("delta") != torch.float16 or "float16 may not hold the product of x and A"


@merged_lora.where
def _merged_low_rank(match: Match):
    (rows, rank), columns = match.tensor("_left").shape, match.tensor("_right").shape[0]
    return _is_smallest(rank, rows, columns) or "the inner dimension is not the smallest"


@group(ops.lora_linear, by="x", into=ops.lora_group, benefit=2)
def shared_input(matches: list[Match]):
    """q, k and v, or gate and up if the MLP is not fused; with dropout if each member has a seed of its own."""
    if any(isinstance(match.arguments["scaling"], fx.Node) for match in matches):
        return "a scaling is a symbolic number"
    dtypes = {tensor.dtype for match in matches if (tensor := meta(match.arguments["lora_a"])) is not None}
    return len(dtypes) == 1 or "the adapters differ in dtype"


RULES: list[Rule | GroupRule] = [lora_linear, lora_add, merged_lora, shared_input]
