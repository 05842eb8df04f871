"""Readers: functions that return the term of a call, for operations whose term depends on their arguments.

A reader is set in the declaration of its operation (`fastlora.graph.canonical_ops`). It returns the term that patterns
see, the term `identity` for a call that only passes on a value, or None for a call that patterns must not see. Shapes
and dtypes come from metadata, never from arguments: under autocast the two differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastlora.graph.derived import DerivedValue, transposed
from fastlora.graph.fake_values import known_equal, meta, same_shape
from fastlora.graph.term import Term, Terms, identity, is_graph_input

CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as"}
"""Methods that may change the dtype; they are read by their effect."""
RESHAPES = {"view", "reshape", "view_as", "reshape_as"}
"""Methods that may change the shape; they are read by their effect."""
POWERS = {2: "square", -0.5: "rsqrt", 0.5: "sqrt"}
"""Exponents for which a power is read as another operation."""


def cast(node: fx.Node) -> Term | None:
    """Read a method of `CASTS` by its effect: an identity, or a cast between floating-point dtypes."""
    source, result = meta(node.args[0]), meta(node)
    if source is None or result is None or source.device != result.device or not same_shape(source, result):
        return None
    if source.dtype == result.dtype:
        return identity(node.args[0])
    floating = source.is_floating_point() and result.is_floating_point()
    return Term("cast", {"input": node.args[0]}) if floating else None


def reshape(terms: Terms, node: fx.Node) -> Term | None:
    """Read a method of `RESHAPES` by its effect: an identity, the flattening of a stack, or another shape."""
    source, result = meta(node.args[0]), meta(node)
    if source is None or result is None or source.dtype != result.dtype:
        return None
    if same_shape(source, result):
        return identity(node.args[0])
    stack = terms.term(node.args[0])
    leading = zip(source.shape[:-2], result.shape[:-1], strict=False)
    is_flatten = stack is not None and stack.op == "stack" and result.dim() == source.dim() - 1
    is_flatten = is_flatten and all(known_equal(a, b) for a, b in leading)  # only the last two dimensions are joined
    return Term("flatten" if is_flatten else "reshape", {"input": node.args[0]})


def copy(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read a copy as an identity."""
    return identity(args["input"])


def dropout(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read an inactive dropout as an identity."""
    if args["training"] is False or args["p"] == 0.0:
        return identity(args["input"])
    return Term("dropout", {"input": args["input"], "p": args["p"]})


def product(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read a product of a value with itself as its square, and one with 1 as an identity."""
    left, right = terms.producer(args["input"]), terms.producer(args["other"])
    if left is right and isinstance(left, fx.Node):
        return Term("square", {"input": args["input"]})
    for factor, other in ((left, args["other"]), (right, args["input"])):
        if _is_one(factor) and _keeps_dtype(node, other):
            return identity(other)
    return Term("mul", args)


def quotient(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read a quotient by 1 as an identity."""
    if args.pop("rounding_mode") is not None:
        return None
    if _is_one(args["other"]) and _keeps_dtype(node, args["input"]):
        return identity(args["input"])
    return Term("div", args)


def power(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read a power with an exponent of `POWERS` as that operation."""
    exponent = args["exponent"]
    if isinstance(exponent, (int, float)) and exponent in POWERS and isinstance(args["input"], fx.Node):
        return Term(POWERS[exponent], {"input": args["input"]})
    return Term("pow", args)


def gelu(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read the tanh approximation as `gelu_tanh`."""
    op = {"none": "gelu", "tanh": "gelu_tanh"}.get(args["approximate"])
    return Term(op, {"input": args["input"]}) if op else None


def layer_norm(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Ignore `cudnn_enable`."""
    return Term("layer_norm", {name: value for name, value in args.items() if name != "cudnn_enable"})


def mean(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read only means over the last dimension that keep it and the dtype."""
    source = meta(args["input"])
    dims = args["dim"] if isinstance(args["dim"], (tuple, list)) else (args["dim"],)
    last = source is not None and len(dims) == 1 and dims[0] in (-1, source.dim() - 1)
    if not last or args["keepdim"] is not True or args["dtype"] is not None:
        return None
    return Term("mean", {"input": args["input"]})


def var(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read only biased variances over the last dimension that keep it."""
    last = args["dim"] in (-1, [-1], (-1,)) and args["keepdim"] is True and args["unbiased"] is False
    return Term("var", {"input": args["input"]}) if last else None


def sum_of(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read `add(x, y, alpha=a)` as the sum of x and a * y."""
    alpha, other = args.pop("alpha"), args["other"]
    if not _is_number(alpha) or (alpha != 1 and meta(other) is None):
        return None
    return Term("add", {"input": args["input"], "other": _times(other, alpha)})


def matmul(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read `x @ W.T`, and `x @ W` of a parameter W, as linear layers without bias."""
    weight = _weight(terms, args["other"])
    return Term("matmul", args) if weight is None else linear(args["input"], weight)


def linear(x: Any, weight: Any, bias: Any = None) -> Term:
    """Return the term of a linear layer."""
    return Term("linear", {"input": x, "weight": weight, "bias": bias})


def addmm(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read a product with a weight and a bias as a linear layer, and any other as the sum of a value and a product."""
    added, x, alpha = args["input"], args["mat1"], args["alpha"]
    weight, result, tensor = _weight(terms, args["mat2"]), meta(node), meta(added)
    if weight is None or result is None or tensor is None or args["beta"] != 1 or not _is_number(alpha):
        return None
    if tensor.dim() == 1 and alpha == 1 and known_equal(tensor.shape[0], result.shape[1]):
        return linear(x, weight, added)
    if not same_shape(tensor, result):
        return None
    product = DerivedValue(torch.mm, (x, args["mat2"]), linear(x, weight), result)
    return Term("add", {"input": added, "other": _times(product, alpha)})


def einsum(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read products of the last dimension with a parameter as linear layers: `"btk,rk->btr"` and `"btk,kr->btr"`."""
    equation, values = args["equation"], (args["first"], args["second"])
    left, _, result = equation.replace(" ", "").partition("->") if isinstance(equation, str) else ("", "", "")
    letters = left.split(",")
    if any(len(set(each)) < len(each) for each in letters):  # a diagonal
        return Term("einsum", args)
    for i, weight in enumerate(values):
        if len(letters) == 2 and len(letters[i]) == 2 and is_graph_input(terms, weight):
            x, summed = values[1 - i], letters[1 - i][-1:]
            made = letters[i].replace(summed, "")
            if len(made) == 1 and made not in letters[1 - i] and result == letters[1 - i][:-1] + made:
                return linear(x, weight if letters[i][1] == summed else transposed(weight))
    return Term("einsum", args)


def _weight(terms: Terms, matrix: Any) -> Any:
    """Return the weight (out, in) if a product with `matrix` (in, out) is a linear layer, or None if it is not."""
    term = terms.term(matrix)
    if term is not None and term.op == "transposed" and meta(term.args["input"]) is not None:
        return term.args["input"]
    tensor = meta(matrix)
    given = tensor is not None and tensor.dim() == 2 and is_graph_input(terms, matrix)
    return transposed(matrix) if given else None


def _times(value: Any, factor: float) -> Any:
    """Return a multiple of a value."""
    if factor == 1:
        return value
    return DerivedValue(torch.mul, (value, factor), Term("mul", {"input": value, "other": factor}))


def attribute(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read `T` and `mT` of a matrix as `transposed`, which linear layers match, and `mT` of a stack of matrices as
    `mT`.
    """
    source = meta(args["input"])
    if source is None or args["name"] not in ("T", "mT"):
        return None
    if source.dim() == 2:
        return Term("transposed", {"input": args["input"]})
    return Term("mT", {"input": args["input"]}) if args["name"] == "mT" and source.dim() > 2 else None


def t(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read `t()` as the attribute `T`."""
    return attribute(terms, node, {"input": args["input"], "name": "T"})


def transpose(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read the transpose of the last two dimensions as the attribute `mT`."""
    source, dims = meta(args["input"]), (args["dim0"], args["dim1"])
    if source is None or source.dim() < 2 or not all(isinstance(dim, int) for dim in dims):
        return None
    last = {dim % source.dim() for dim in dims} == {source.dim() - 2, source.dim() - 1}
    return attribute(terms, node, {"input": args["input"], "name": "mT"}) if last else None


def grouped_mm(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read only products of sorted rows with a stack of matrices, without further arguments."""
    supported = args["bias"] is None and args["out_dtype"] is None and args["offs"] is not None
    return Term("grouped_mm", {name: args[name] for name in ("input", "mat2", "offs")}) if supported else None


def cat(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read only concatenations along the last dimension."""
    return _join("cat", node, args)


def stack(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read only stacks along a new last dimension."""
    return _join("stack", node, args)


def _join(op: str, node: fx.Node, args: dict[str, Any]) -> Term | None:
    result, tensors = meta(node), args["tensors"]
    last = result is not None and args["dim"] in (-1, result.dim() - 1) and isinstance(tensors, (tuple, list))
    return Term(op, {"tensors": tuple(tensors)}) if last else None


def log_softmax(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read only log-softmax over the last dimension; the dtype is that of the result."""
    return Term("log_softmax", {"input": args["input"]}) if _is_last(args["dim"], meta(args["input"])) else None


def gather(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read only gathers along the last dimension."""
    last = _is_last(args["dim"], meta(args["input"])) and not args["sparse_grad"]
    return Term("gather", {"input": args["input"], "index": args["index"]}) if last else None


def unsqueeze(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read only a new last dimension."""
    return Term("unsqueeze", {"input": args["input"]}) if _is_last(args["dim"], meta(node)) else None


def squeeze(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read only the removal of a last dimension of size one."""
    source = meta(args["input"])
    last = source is not None and _is_last(args["dim"], source) and known_equal(source.shape[-1], 1)
    return Term("squeeze", {"input": args["input"]}) if last else None


def _is_last(dim: Any, tensor: torch.Tensor | None) -> bool:
    return tensor is not None and not isinstance(dim, fx.Node) and dim in (-1, tensor.dim() - 1)


def flatten(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read only the flattening of the last two dimensions."""
    source = meta(args["input"])
    last_two = source is not None and args["start_dim"] in (-2, source.dim() - 2)
    last_two = last_two and source is not None and args["end_dim"] in (-1, source.dim() - 1)
    return Term("flatten", {"input": args["input"]}) if last_two else None


def getitem(terms: Terms, node: fx.Node, args: dict[str, Any]) -> Term | None:
    """Read slices of the last dimension, with resolved bounds, and elements of `chunk` and `split` as slices."""
    source, index = args["input"], args["index"]
    if isinstance(source, fx.Node) and isinstance(index, int) and meta(source) is None:
        return _split_piece(terms, node, source, index)
    tensor = meta(source)
    if tensor is None or meta(node) is None:
        return None
    parts = index if isinstance(index, tuple) else (index,)
    if not all(part is Ellipsis or isinstance(part, slice) for part in parts) or parts.count(Ellipsis) > 1:
        return None
    *leading, last = parts
    if last is Ellipsis or (Ellipsis not in leading and len(parts) < tensor.dim()):
        leading, last = list(parts), slice(None)
    if any(part is not Ellipsis and not _is_full(part) for part in leading):
        return None
    return _slice(args["input"], tensor, last)


def _split_piece(terms: Terms, node: fx.Node, source: fx.Node, index: int) -> Term | None:
    """Return the slice that is an element of `chunk` or `split` along the last dimension."""
    term, piece = terms.term(source), meta(node)
    if term is None or term.op not in ("chunk", "split") or piece is None:
        return None
    tensor = meta(whole := term.args.get("input", term.args.get("tensor")))
    if tensor is None or term.args["dim"] not in (-1, tensor.dim() - 1) or index < 0:
        return None
    sections = term.args.get("split_size_or_sections")
    size = tensor.shape[-1]
    if isinstance(sections, (list, tuple)):
        start = sum(sections[:index])
    else:
        start = index * (sections if sections is not None else -(-size // term.args["chunks"]))
    return _slice(whole, tensor, slice(start, start + piece.shape[-1]))


def _slice(source: Any, tensor: torch.Tensor, part: slice) -> Term | None:
    """Return a slice of the last dimension with resolved bounds; the full slice is an identity."""
    size = tensor.shape[-1]
    if not isinstance(size, int) or not all(
        p is None or isinstance(p, int) for p in (part.start, part.stop, part.step)
    ):
        return identity(source) if _is_full(part) else None
    start, stop, step = part.indices(size)
    if (start, stop, step) == (0, size, 1):
        return identity(source)
    return Term("slice", {"input": source, "start": start, "stop": stop, "step": step})


def _is_full(part: slice) -> bool:
    return part.start in (None, 0) and part.stop is None and part.step in (None, 1)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_one(value: Any) -> bool:
    return _is_number(value) and value == 1


def _keeps_dtype(node: fx.Node, source: Any) -> bool:
    before, after = meta(source), meta(node)
    return before is not None and after is not None and before.dtype == after.dtype and same_shape(before, after)
