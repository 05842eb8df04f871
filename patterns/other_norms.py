"""Norms without `rsqrt`: a value divided by its own norm, or root mean square, over the last dimension."""

from __future__ import annotations

from typing import Any

from torch import fx

from fastlora.graph.fake_values import meta
from fastlora.graph.view import View
from fastlora.patterns.candidates import factors, is_weight, name_of, operands, tensors

L2 = "it divides by the root of a sum, as an L2 norm does, and not of a mean"
_NORMS = {"norm": "norm()", "linalg_norm": "torch.linalg.norm", "linalg_vector_norm": "torch.linalg.vector_norm"}
_NORMS |= {"normalize": "F.normalize"}
_LAYOUTS = {"cast", "expand", "expand_as", "unsqueeze", "getitem"}
_AWAY_FROM_ZERO = {"add", "clamp", "clamp_min", "maximum"}
_REACH = 8


def divides_its_own(view: View, node: fx.Node) -> bool:
    """Return whether a node is the norm of a value that is divided by it, or `normalize`.

    Norms of weights do not count, since they normalize no activations.
    """
    name = name_of(view, node)
    value: Any = None
    if name in _NORMS and _is_euclidean(view, node):
        value = tensors(view, node)[0]
    elif name == "sqrt" and tensors(view, node):
        value = _squared(view, node)
    if value is None or is_weight(view, value) or not _over_last(view, _reduction(view, node), meta(value)):
        return False
    return name == "normalize" or _scaled_quotient(view, node, value) is not None


def why_not(view: View, node: fx.Node) -> str | None:
    """Return why no rule matches such a norm, or None for any other node."""
    name = name_of(view, node)
    if name not in _NORMS:
        return None
    if name == "normalize":
        scaled = _is_scaled(view, node)
    else:
        scaled = bool(_scaled_quotient(view, node, tensors(view, node)[0]))
    return f"normalized by {_NORMS[name]}, which no rule covers" if scaled else L2


def _argument(view: View, node: fx.Node, name: str, position: int) -> Any:
    """Return an argument by its name or position, None if it is omitted."""
    term = view.term(node)
    given = node.kwargs if term is None else term.args
    return given.get(name, node.args[position] if term is None and len(node.args) > position else None)


def _is_euclidean(view: View, node: fx.Node) -> bool:
    orders = _argument(view, node, "p", 1), _argument(view, node, "ord", 1)
    return all(order in (None, 2, "fro") for order in orders)


def _over_last(view: View, node: fx.Node, source: Any) -> bool:
    """Return whether a reduction is over the last dimension only."""
    name = name_of(view, node)
    term = view.term(node)
    if term is not None and term.op == "mean":
        return True
    dim = _argument(view, node, "dim", 1 if name in ("sum", "mean") else 2)
    if name == "normalize" and dim is None:
        dim = 1
    dims = dim if isinstance(dim, (tuple, list)) else [dim]
    return source is not None and len(dims) == 1 and dims[0] in (-1, source.dim() - 1)


def _reduction(view: View, node: fx.Node) -> fx.Node:
    """Return the argument of a square root, without an added number; other nodes as they are."""
    if name_of(view, node) == "sqrt":
        node = tensors(view, node)[0]
        if name_of(view, node) == "add" and len(tensors(view, node)) == 1:
            node = tensors(view, node)[0]
    return node


def _squared(view: View, root: fx.Node) -> fx.Node | None:
    """Return x for the square root of a sum or a mean of x squared, None for other roots."""
    reduced = _reduction(view, root)
    square = tensors(view, reduced)[0] if name_of(view, reduced) in ("sum", "mean") else None
    return tensors(view, square)[0] if name_of(view, square) == "square" else None


def _is_by_number(view: View, node: fx.Node) -> bool:
    """Return whether a node is the product or quotient of a tensor and a number."""
    return name_of(view, node) in ("mul", "div") and len(tensors(view, node)) == 1


def _is_scaled(view: View, node: fx.Node) -> bool:
    """Return whether a value, possibly after a cast, is scaled by a number."""
    users = view.users(node)
    return any(
        _is_by_number(view, user) or (name_of(view, user) == "cast" and _is_scaled(view, user)) for user in users
    )


def _scaled_quotient(view: View, norm: fx.Node, value: fx.Node) -> bool | None:
    """Return whether the quotient of a value and its norm is scaled by a number, as it is for a root mean square; None
    if there is no such quotient."""
    own = set(factors(view, value))
    reached = [(norm, False, False)]  # node, whether it is inverted, whether it was scaled by a number
    for node, inverted, scaled in reached:
        for user in view.users(node) if len(reached) < 3 * _REACH else ():
            name, given = name_of(view, user), operands(view, user)
            divides = name == "div" and given[1] is node
            others = [factor for each in given[:2] if each is not node for factor in factors(view, each)]
            if (divides or (inverted and name == "mul")) and own & set(others):
                return scaled or _is_scaled(view, user)
            if _is_by_number(view, user) or name == "reciprocal":
                reached.append((user, inverted or divides or name == "reciprocal", scaled or name != "reciprocal"))
            elif name in _LAYOUTS or (name in _AWAY_FROM_ZERO and not inverted):  # after inversion it would clip
                reached.append((user, inverted, scaled))
    return None
