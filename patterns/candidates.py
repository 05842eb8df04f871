"""Helpers with which anchors inspect nodes, including those that are opaque to rules.

Rules match terms of the view. Anchors recognize candidates more liberally, so that a report can say why one is not
fused: they also inspect in-place operations and operations without a canonical name, by the function that a node calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx

from fastlora.graph.canonical_ops import signature_of
from fastlora.graph.derived import DerivedValue
from fastlora.graph.fake_values import meta
from fastlora.graph.view import View

_AUGMENTED = {"imul": "mul", "itruediv": "div", "iadd": "add", "isub": "sub"}
_PIECES = {"slice", "getitem", "chunk", "split", "tensor_split", "unbind", "narrow", "select"}
_LAYOUTS = {"reshape", "view", "flatten", "unflatten", "unsqueeze", "squeeze"}
_LAYOUTS |= {"transposed", "mT", "transpose", "permute"}
_COPIES = {"cast", "to", "contiguous", "clone", "detach", "dropout", "alpha_dropout", "neg"}
_SHARDS = {"from_local", "to_local", "redistribute", "full_tensor"}
_SHARDS |= {"all_reduce", "all_gather_into_tensor", "wait_tensor"}
_BOUNDS = {"clamp", "clamp_min", "clamp_max"}
BETWEEN = _LAYOUTS | _COPIES | _SHARDS
"""Operations whose result has the entries of their first operand, possibly copied, rearranged or negated."""

_OUT_FIRST = {"linear", "conv1d", "conv2d", "conv3d"}
_PRODUCTS = _OUT_FIRST | {"matmul", "mm", "bmm", "addmm", "grouped_mm", "einsum"}

_REACH = 12


def name_of(view: View, value: Any) -> str:
    """Return the canonical operation that computes a value, or for an opaque node the name of the function that it
    calls, without a marker of in-place operations; "" for values that are not computed."""
    node = view.producer(value)
    if not isinstance(node, fx.Node) or not node.op.startswith("call"):
        return ""
    term = view.term(node)
    if term is not None:
        return term.op
    called = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    plain = called.partition(".")[0].rstrip("_")  # of an overload, the operator
    return _AUGMENTED.get(plain, plain)


def operands(view: View, value: Any) -> list[Any]:
    """Return the operands of a node in order: nodes, and constants."""
    node = view.producer(value)
    term = view.term(node)
    if term is None:
        return [view.producer(each) for each in (*node.args, *node.kwargs.values())]
    signature = signature_of(term.op)
    names = term.args if signature is None else [name for name in signature.names if name in term.args]
    return [view.producer(term.args[name]) for name in names]


def tensors(view: View, value: Any) -> list[fx.Node]:
    """Return the operands that are tensors."""
    return [each for each in operands(view, value) if meta(each) is not None]


def writes(view: View, node: fx.Node) -> bool:
    """Return whether a node writes to one of its operands in place, in a way that no rule can read."""
    return node in view.mutations.writers(node) and node not in view.functional_writes


def _origin(view: View, value: Any) -> Any:
    """Return the value at the start of the chain of operations with a single input that ends at a value."""
    node = view.producer(value)
    if isinstance(node, DerivedValue):
        (node,) = node.nodes()
    while isinstance(node, fx.Node) and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node


def is_given(view: View, value: Any) -> bool:
    """Return whether a value is an input of the graph, or computed from a single one."""
    node = _origin(view, value)
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def is_weight(view: View, value: Any) -> bool:
    """Return whether a value is a parameter or buffer of a module, or computed from a single one."""
    node = _origin(view, value)
    if not is_given(view, node):
        return False
    is_static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None
    return node.op == "get_attr" or is_static


def factors(view: View, value: Any) -> list[fx.Node]:
    """Return the factors of an elementwise product, looking through casts; the value itself if it is no product."""
    if meta(value) is None:
        return []
    if name_of(view, value) in ("mul", "cast"):
        return [factor for other in operands(view, value)[:2] for factor in factors(view, other)]
    return [view.producer(value)]


def before(view: View, value: Any) -> fx.Node | None:
    """Return the input of an operation in `BETWEEN`, or of a scaling by numbers or parameters; otherwise None."""
    name = name_of(view, value)
    found = tensors(view, value) if name in BETWEEN or name in ("mul", "div") else []
    if name in ("mul", "div"):
        found = [each for each in found if not is_given(view, each)]
        return found[0] if len(found) == 1 else None
    return found[0] if found else None


@dataclass(frozen=True)
class Product:
    """A matrix product of an input and a weight, with its numbers of input and output features."""

    op: str
    input: fx.Node
    weight: fx.Node
    in_features: Any
    out_features: Any
    biased: bool = False


def product(view: View, value: Any) -> Product | None:
    """Return the matrix product with a weight that computes a value; None for any other value."""
    name = name_of(view, value)
    if name not in _PRODUCTS:
        return None
    found = operands(view, value)
    if name == "einsum":
        return _einsum(view, found)
    if name == "addmm":
        found = [*found[1:3], found[0]]
    x, weight, *rest = found
    matrix = meta(weight)
    if meta(x) is None or matrix is None or matrix.dim() < 2 or (name != "linear" and not is_given(view, weight)):
        return None
    biased = name != "grouped_mm" and any(meta(each) is not None for each in rest)
    if name in _OUT_FIRST:
        plain = matrix.dim() == 2 if name == "linear" else _groups(view.producer(value)) == 1
        return Product(name, x, weight, matrix.shape[1], matrix.shape[0], biased) if plain else None
    return Product(name, x, weight, matrix.shape[-2], matrix.shape[-1], biased)


def _groups(convolution: fx.Node) -> Any:
    return convolution.kwargs.get("groups", convolution.args[6] if len(convolution.args) > 6 else 1)


def _einsum(view: View, found: list[Any]) -> Product | None:
    """Return a product of two operands, of which the second, or otherwise the first, is a weight."""
    equation, *values = found
    if len(values) == 1 and isinstance(values[0], (tuple, list)):
        values = [view.producer(each) for each in values[0]]
    if not isinstance(equation, str) or len(values) != 2 or any(meta(each) is None for each in values):
        return None
    left, arrow, result = equation.replace(" ", "").partition("->")
    letters = left.split(",")
    weights = [i for i in (1, 0) if is_given(view, values[i]) and "." not in letters[i]]
    if not arrow or not weights:
        return None
    weight_letters, x = letters[weights[0]], letters[1 - weights[0]]
    weight = values[weights[0]]
    tensor = meta(weight)
    assert tensor is not None
    sizes = dict(zip(weight_letters, tensor.shape, strict=True))
    in_features = prod(size for letter, size in sizes.items() if letter in x and letter not in result)
    out_features = prod(size for letter, size in sizes.items() if letter not in x and letter in result)
    return Product("einsum", values[1 - weights[0]], weight, in_features, out_features)


def layer_inputs(view: View, value: Any, reach: int = _REACH) -> set[fx.Node] | None:
    """Return the inputs of the linear layers whose outputs, or pieces or sums of them, make up a value; None if it is
    computed differently."""
    layer = product(view, value)
    if layer is not None:
        x = layer.input
        while name_of(view, x) in BETWEEN and tensors(view, x):
            x = tensors(view, x)[0]
        return {x}
    name = name_of(view, value)
    if reach == 0 or name not in BETWEEN | _PIECES | _BOUNDS | {"add", "sub", "mul", "div"}:
        return None
    found = [each for each in operands(view, value) if isinstance(each, fx.Node) and not isinstance(meta(each), int)]
    found = [each for each in found if not is_given(view, each) and _is_value(each)]
    if name not in ("add", "sub", "mul", "div"):
        found = found[:1]
    inputs = [layer_inputs(view, each, reach - 1) for each in found]
    if not inputs or (name in ("mul", "div") and len(inputs) > 1):
        return None
    return None if any(each is None for each in inputs) else {x for each in inputs if each for x in each}


def _is_value(node: fx.Node) -> bool:
    """Return whether the value of a node is a tensor or a sequence of tensors, not a number."""
    return meta(node) is not None or isinstance(node.meta.get("example_value"), (tuple, list))
