"""LoRA on the parameters of experts, whose matrices are stacked in one three-dimensional tensor.

PEFT adds the adapters' low-rank products to such a parameter in one `baddbmm`. If tokens are sorted by expert and the
sum is read by a grouped product, both are fused to an op that does not materialize the sum. Code that indexes the sum,
for each token or in a loop over the experts, is not fused.
"""

from __future__ import annotations

from torch import fx

from fastlora.graph.fake_values import known_equal, known_less, meta, same_shape
from fastlora.graph.view import View
from fastlora.kernels import ops
from fastlora.kernels.core.grouped_mm import uses_grouped_mm
from fastlora.match.dsl import Param, Scalar, baddbmm, either, grouped_mm, grouped_mm_or_zero, mT
from fastlora.match.rule import GroupRule, Match, Rule, rule
from fastlora.match.state import describe
from fastlora.patterns.candidates import is_given

_PARAMETER = Param(3)
_SUM = "the sum of weight and adapter"
_ADVICE = "where transformers can sort tokens by expert, set_experts_implementation('grouped_mm') has it fused"


def adapted_experts(view: View, node: fx.Node) -> bool:
    """Return whether a node is the sum of a three-dimensional parameter and batched low-rank products of parameters.

    Attention scores with a bias look the same, except that their factors are not parameters.
    """
    term = view.term(node)
    if term is None or term.op not in ("baddbmm", "add"):
        return False
    if term.op == "baddbmm":
        left, right = term.args["batch1"], term.args["batch2"]
        products = is_given(view, left) and is_given(view, right) and _has_lower_rank(meta(left), meta(right))
        return products and _is_weight(view, term.args["input"], node)
    return any(
        _is_weight(view, term.args[weight], node) and _is_sum_of_products(view, term.args[other])
        for weight, other in (("input", "other"), ("other", "input"))
    )


def _is_weight(view: View, value, total: fx.Node) -> bool:
    """Return whether a value is a three-dimensional parameter of the shape of `total`."""
    tensor, result = meta(value), meta(total)
    return _PARAMETER(view, value) is True and tensor is not None and result is not None and same_shape(tensor, result)


def _has_lower_rank(left, right):
    """Return whether the rank R of left (E, M, R) and right (E, R, N) is smaller than M and N."""
    return known_less(right.shape[1], left.shape[1]) and known_less(right.shape[1], right.shape[2])


def _is_sum_of_products(view: View, value) -> bool:
    """Return whether a value is an einsum of parameters, or computed from such by scaling, casting and adding."""
    term = view.term(value)
    if term is None:
        return False
    if term.op in ("mul", "cast"):
        return _is_sum_of_products(view, term.args["input"])
    if term.op == "add":
        return all(_is_sum_of_products(view, term.args[name]) for name in ("input", "other"))
    return term.op == "einsum" and all(is_given(view, term.args[name]) for name in ("first", "second"))


@rule(
    ops.lora_experts,
    anchor=adapted_experts,
    benefit=2,
    attrs={
        "out_first": lambda match: match.tag("layout") == "out_first",
        "zero_rest": lambda match: match.tag("product") == "zero",
    },
)
def lora_experts(x, weight: Param(3), left, right, offs, scaling: Scalar = 1.0):
    total = baddbmm(weight, left, right, alpha=scaling)
    matrices = either(out_first=mT(total), in_first=total).named("layout")
    zero = grouped_mm_or_zero(x, matrices, offs)
    return either(zero=zero, undefined=grouped_mm(x, matrices, offs)).named("product")


@lora_experts.where
def _needs_no_synchronization(match: Match):
    """Without a grouped kernel, each forward and backward would synchronize, which CUDA graphs do not allow."""
    x = match.tensor("x")
    return (
        x.device.type == "cpu" or uses_grouped_mm(x) or f"on a {x.device.type} device grouped products are of bfloat16"
    )


@lora_experts.where
def _has_low_rank(match: Match):
    return _has_lower_rank(match.tensor("left"), match.tensor("right")) or "the inner dimension is not the smallest"


@lora_experts.where
def _weight_is_not_broadcast(match: Match):
    weight, left, right = (match.tensor(name) for name in ("weight", "left", "right"))
    product = (left.shape[0], left.shape[1], right.shape[2])
    return all(map(known_equal, weight.shape, product)) or "the weight is broadcast"


@lora_experts.where
def _one_dtype(match: Match):
    dtypes = {match.dtype(name) for name in ("x", "weight", "left", "right")}
    return len(dtypes) == 1 or f"its operands differ in dtype: {', '.join(sorted(map(str, dtypes)))}"


@lora_experts.otherwise
def _why_not(view: View, total: fx.Node) -> str | None:
    """Return which readers of the sum, other than a single grouped product, prevent the fusion."""
    term = view.term(total)
    if term is not None and term.op == "add":
        return "several adapters are active on one parameter, and PEFT multiplies each out to add them up"
    readers = [user for user in _users_through_transposes(view, total) if not _is_grouped(view, user)]
    if any(user.op == "output" for user in readers):
        return f"{_SUM} leaves the graph before a product reads it, as where experts run in a loop; {_ADVICE}"
    if any(_is_indexing(user) for user in readers):
        return f"each token, or each expert, takes its matrix out of {_SUM}; {_ADVICE}"
    return f"{describe(readers[0])}, which is not a grouped product, reads {_SUM}" if readers else None


def _is_grouped(view: View, node: fx.Node) -> bool:
    term = view.term(node)
    return term is not None and term.op in ("grouped_mm", "grouped_mm_or_zero")


def _users_through_transposes(view: View, node: fx.Node) -> list[fx.Node]:
    """Return the users of a value, with transposes replaced by their users."""
    found: list[fx.Node] = []
    for user in view.users(node):
        term = view.term(user)
        found += _users_through_transposes(view, user) if term is not None and term.op == "mT" else [user]
    return found


def _is_indexing(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", node.target) in ("getitem", "index_select", "unbind", "select")


RULES: list[Rule | GroupRule] = [lora_experts]
