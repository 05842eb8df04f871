"""Rotary position embeddings, x * cos + rotate(x) * sin, in the layouts of `kernels/formulas/rotary.py`; those of q and
k are grouped to one op."""

from collections.abc import Callable, Iterator

import torch
from torch import fx

from fastlora.graph.derived import DerivedValue
from fastlora.graph.fake_values import known_equal, meta, same_shape
from fastlora.graph.view import View
from fastlora.kernels import ops
from fastlora.match.dsl import (
    Pattern,
    cast,
    cat,
    either,
    evens,
    first_half,
    flatten,
    flatten_pairs,
    odds,
    piece,
    raised,
    reshape,
    second_half,
    view_as_complex,
    view_as_real,
    widened,
)
from fastlora.match.rule import GroupRule, Match, Rule, dtype_of, fuse, group, rule, tag_of


def joins_rotated_halves(view: View, node) -> bool:
    """Return whether a node concatenates or stacks two slices, one of which is negated, as a rotation does."""
    term = view.term(node)
    if term is None or term.op not in ("cat", "stack") or len(term.args["tensors"]) != 2:
        return False
    inner = [view.term(part) for part in term.args["tensors"]]
    negated = [
        t.args["input"] if t is not None and t.op == "neg" else part
        for t, part in zip(inner, term.args["tensors"], strict=True)
    ]
    sources = [view.term(part) for part in negated]
    sliced = all(t is not None and t.op == "slice" for t in sources)
    return sliced and sum(t is not None and t.op == "neg" for t in inner) == 1


def _rotate(x: Pattern) -> Pattern:
    return either(
        half=cat(-second_half(x), first_half(x)),
        flipped=cat(second_half(x), -first_half(x)),
        pairs=flatten_pairs(-odds(x), evens(x)),
    ).named("layout")


def _width(match: Match) -> int:
    return match.tensor("x").shape[-1]


@rule(
    ops.rotary,
    benefit=2,
    anchor=joins_rotated_halves,
    attrs={
        "layout": tag_of("layout"),
        "rotary_dim": _width,
        "compute_dtype": dtype_of("q"),
        "out_dtype": dtype_of(),
    },
)
def rotary(x, cos, sin):
    q = widened(x).named("q")
    rotated = either(wide=_rotate(q), narrow=widened(_rotate(x)))
    return cast(q * cos + rotated * sin)


@rotary.where
def _tables_are_as_wide(match):
    width = match.tensor("x").shape[-1]
    fits = all(known_equal(match.tensor(name).shape[-1], width) for name in ("cos", "sin"))
    return (fits and known_equal(width % 2, 0)) or "cos and sin are not as wide as x, or that is odd"


@rule(
    ops.rotary,
    benefit=2,
    attrs={"layout": "interleaved", "rotary_dim": _width, "compute_dtype": dtype_of("q"), "out_dtype": dtype_of()},
)
def interleaved_rotary(x, cos, sin):
    """Pairs as input, halves as output; the tables contain each angle once."""
    q = widened(x).named("q")
    even, odd = evens(q), odds(q)
    return cast(cat(even * cos - odd * sin, odd * cos + even * sin))


@interleaved_rotary.where
def _tables_are_half_as_wide(match):
    width = match.tensor("x").shape[-1]
    fits = all(known_equal(2 * match.tensor(name).shape[-1], width) for name in ("cos", "sin"))
    return fits or "cos and sin are not half as wide as x"


@rotary.where
@interleaved_rotary.where
def _tables_broadcast_into_x(match):
    return same_shape(match.tensor(), match.tensor("x")) or "cos and sin make the result larger than x"


def _is_complex_rotation(view: View, node: fx.Node) -> bool:
    """Return whether a node is `view_as_real` of a product of two complex tensors, one of them made of pairs."""
    term = view.term(node)
    if term is None or term.op != "view_as_real":
        return False
    product = view.term(term.args["input"])
    factors = list(product.args.values()) if product is not None and product.op == "mul" else []
    made_of_pairs = [each is not None and each.op == "view_as_complex" for each in map(view.term, factors)]
    return any(made_of_pairs) and all(tensor is not None and tensor.is_complex() for tensor in map(meta, factors))


def _table(part: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Match], DerivedValue]:
    """Return, for `attrs`, the real or imaginary part of the complex table, with each entry twice."""
    return lambda match: DerivedValue(
        torch.repeat_interleave, (DerivedValue(part, (match.value("_rotations"),)), 2, -1)
    )


@rule(
    ops.rotary,
    benefit=2,
    anchor=_is_complex_rotation,
    attrs={
        "cos": _table(torch.real),
        "sin": _table(torch.imag),
        "layout": "pairs",
        "rotary_dim": _width,
        "compute_dtype": dtype_of("q"),
        "out_dtype": dtype_of(),
    },
)
def complex_rotary(x, _rotations):
    """Pairs as complex numbers, multiplied by cos + i sin."""
    q = widened(x).named("q")
    rotated = view_as_real(view_as_complex(reshape(q).named("pairs")) * _rotations)
    return cast(either(flattened=flatten(rotated), reshaped=reshape(rotated)))


@complex_rotary.where
def _pairs_are_adjacent_entries(match):
    x, pairs, rotations = match.tensor("x"), match.tensor("pairs"), match.tensor("_rotations")
    if pairs.dim() < 3 or rotations.dim() == 0:
        return "the complex numbers are not the pairs of adjacent entries of x"
    if rotations.dtype != torch.complex64 and match.dtype("q") != torch.float64:
        return "the table is more exact than the computation"
    shape = (*x.shape[:-1], pairs.shape[-2], 2)
    split = pairs.dim() == x.dim() + 1 and all(map(known_equal, pairs.shape, shape))
    whole = split and known_equal(2 * pairs.shape[-2], x.shape[-1]) and same_shape(match.tensor(), x)
    fits = known_equal(rotations.shape[-1], pairs.shape[-2])
    return (whole and fits) or "the complex numbers are not the pairs of adjacent entries of x"


def _rotated_width(match: Match) -> int:
    return match.slice_of("rotated")["stop"]


@fuse(ops.rotary, benefit=2, attrs={"rotary_dim": _rotated_width, "out_dtype": dtype_of()})
def partial_rotary(x):
    """Only the first entries of each head are rotated."""
    anything = lambda _: True  # noqa: E731
    rotated = raised(ops.rotary, x=piece(x, "rotated"), rotary_dim=anything, out_dtype=anything)
    return cast(cat(rotated, piece(x, "rest")))


@partial_rotary.where
def _pieces_cover_the_input(match):
    rotated, rest = match.slice_of("rotated"), match.slice_of("rest")
    adjacent = rotated["start"] == 0 and rotated["stop"] == rest["start"]
    return (
        adjacent and rest["stop"] == match.tensor("x").shape[-1]
    ) or "the rotated part and the rest are not the whole input"


class _InOneLayer(GroupRule):
    """Groups only neighboring matches: all layers of a graph share cos and sin, and each rotates its own q and k."""

    def find(self, view: View, candidates: list[Match]) -> Iterator[Match]:
        for neighbors in _neighbors(view, _outermost([m for m in candidates if m.op is self.member])):
            yield from super().find(view, neighbors)


def _outermost(matches: list[Match]) -> list[Match]:
    """Return the matches that are not part of another, such as of a partial embedding."""
    return [m for m in matches if not any(m.root in other.members for other in matches if other.root is not m.root)]


def _neighbors(view: View, matches: list[Match]) -> Iterator[list[Match]]:
    """Yield runs of matches whose inputs are all computed before any of their outputs is used."""
    run: list[Match] = []
    for match in sorted(matches, key=lambda m: view.order[m.root]):
        longer = [*run, match]
        ready = max(view.order[node] for m in longer for node in m.argument_nodes())
        used = min((view.order[user] for m in longer for user in m.outside_users()), default=ready + 1)
        if run and ready >= used:
            yield run
            longer = [match]
        run = longer
    yield run


@group(ops.rotary, by="cos", into=ops.rotary_group, benefit=2)
def query_and_key(matches: list[Match]):
    """q and k of one attention layer, which share cos and sin."""
    tables = [meta(match.arguments[name]) for match in matches for name in ("cos", "sin")]
    learned = any(table is None or table.requires_grad for table in tables)
    return not learned or "the angles are learned: each embedding keeps its own input"


query_and_key = _InOneLayer(**vars(query_and_key))

RULES: list[Rule | GroupRule] = [rotary, interleaved_rotary, complex_rotary, partial_rotary, query_and_key]
