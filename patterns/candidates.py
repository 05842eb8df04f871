"""How anchors read nodes, including those that are opaque to rules.

Rules match terms of the view. An anchor only has to recognize what is computed, so that a report can say why it is not
fused: it also reads in-place forms and operations without a canonical name, by what the node calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx

from fastlora.graph.canonical_ops import signature_of
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
"""Operations whose result holds the entries of their first operand, possibly copied, moved or negated."""

_OUT_FIRST = {"linear", "conv1d", "conv2d", "conv3d"}
_PRODUCTS = _OUT_FIRST | {"matmul", "mm", "bmm", "addmm", "grouped_mm", "einsum"}

_REACH = 12


def name_of(view: View, value: Any) -> str:
    """Return the name of what makes a value: its canonical operation, or what an opaque node calls, in place or not."""
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
    """Return the operands of a node in order: the producers of values, and constants."""
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
    """Return whether a node writes its result over one of its operands."""
    return node in view.mutations.writers(node)


def _origin(view: View, value: Any) -> Any:
    """The value that a chain of casts, views and other operations on one value starts from."""
    node = view.producer(value)
    while isinstance(node, fx.Node) and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node


def is_given(view: View, value: Any) -> bool:
    """Return whether a value is an input of the graph, or computed from one alone."""
    node = _origin(view, value)
    return isinstance(node, fx.Node) and node.op in ("placeholder", "get_attr")


def is_weight(view: View, value: Any) -> bool:
    """Return whether a value is a parameter or buffer of a module, or computed from one alone."""
    node = _origin(view, value)
    if not is_given(view, node):
        return False
    held = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type") is not None
    return node.op == "get_attr" or held


def factors(view: View, value: Any) -> list[fx.Node]:
    """Return the tensors that a value is a product of, without their casts."""
    if meta(value) is None:
        return []
    if name_of(view, value) in ("mul", "cast"):
        return [factor for other in operands(view, value)[:2] for factor in factors(view, other)]
    return [view.producer(value)]


def before(view: View, value: Any) -> fx.Node | None:
    """Return the value that an operation of `BETWEEN`, or a product with numbers or parameters, is computed from."""
    name = name_of(view, value)
    found = tensors(view, value) if name in BETWEEN or name in ("mul", "div") else []
    if name in ("mul", "div"):
        found = [each for each in found if not is_given(view, each)]
        return found[0] if len(found) == 1 else None
    return found[0] if found else None


@dataclass(frozen=True)
class Product:
    """A product of a value with a weight: the operation, and the sizes that it sums over and produces."""

    op: str
    input: fx.Node
    weight: fx.Node
    summed: Any
    made: Any
    biased: bool = False


def product(view: View, value: Any) -> Product | None:
    """Return how a value is a product with a weight, or None if it is not."""
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
    """A product of two operands, of which the second, or else the first, is a weight."""
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
    of, x = letters[weights[0]], letters[1 - weights[0]]
    weight = values[weights[0]]
    tensor = meta(weight)
    assert tensor is not None
    sizes = dict(zip(of, tensor.shape, strict=True))
    summed = prod(size for letter, size in sizes.items() if letter in x and letter not in result)
    made = prod(size for letter, size in sizes.items() if letter not in x and letter in result)
    return Product("einsum", values[1 - weights[0]], weight, summed, made)


def layer_inputs(view: View, value: Any, reach: int = _REACH) -> set[fx.Node] | None:
    """Return what the linear layers read whose results a value consists of, as pieces or sums; None if it is computed
    otherwise."""
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
    """Whether the value of a node is a tensor, or several of them, and not a number."""
    return meta(node) is not None or isinstance(node.meta.get("example_value"), (tuple, list))
