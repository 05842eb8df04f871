"""How the view reads operations whose meaning depends on their arguments, or that mean something else.

A reader is named in the declaration of its operation (`fastlora.graph.canonical_ops`). It returns the term that
patterns see, a term `identity` for a call that only hands on a value, or None for a call that no pattern may see.
Shapes and dtypes come from the recorded metadata, never from arguments: under autocast the two differ.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from fastlora.graph.fake_values import known_equal, meta, same_shape
from fastlora.graph.term import Term, Terms, identity

CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as"}
"""Methods that may change a dtype, whatever their arguments are."""
RESHAPES = {"view", "reshape", "view_as", "reshape_as"}
"""Methods that may change a shape, whatever their arguments are."""
POWERS = {2: "square", -0.5: "rsqrt", 0.5: "sqrt"}
"""The exponents for which a power is an operation of its own."""


def cast(node: fx.Node) -> Term | None:
    """Read a method of `CASTS` by its effect: an identity, or a change between floating-point dtypes."""
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
    kept = zip(source.shape[:-2], result.shape[:-1], strict=False)
    unstacks = stack is not None and stack.op == "stack" and result.dim() == source.dim() - 1
    joins = unstacks and all(known_equal(a, b) for a, b in kept)  # what was stacked, and what it was stacked on
    return Term("flatten" if joins else "reshape", {"input": node.args[0]})


def copy(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read a copy as what it copies."""
    return identity(given["input"])


def dropout(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read a dropout that is not active as an identity."""
    if given["inplace"]:
        return None
    if given["training"] is False or given["p"] == 0.0:
        return identity(given["input"])
    return Term("dropout", {"input": given["input"], "p": given["p"]})


def product(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read a product of a value with itself as its square, and one with 1 as an identity."""
    left, right = terms.producer(given["input"]), terms.producer(given["other"])
    if left is right and isinstance(left, fx.Node):
        return Term("square", {"input": given["input"]})
    for factor, other in ((left, given["other"]), (right, given["input"])):
        if _is_one(factor) and _keeps_dtype(node, other):
            return identity(other)
    return Term("mul", given)


def quotient(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read a quotient by 1 as an identity."""
    if given.pop("rounding_mode") is not None:
        return None
    if _is_one(given["other"]) and _keeps_dtype(node, given["input"]):
        return identity(given["input"])
    return Term("div", given)


def power(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read powers that are operations of their own as these."""
    exponent = given["exponent"]
    if isinstance(exponent, (int, float)) and exponent in POWERS and isinstance(given["input"], fx.Node):
        return Term(POWERS[exponent], {"input": given["input"]})
    return Term("pow", given)


def gelu(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read the approximation as an operation of its own."""
    op = {"none": "gelu", "tanh": "gelu_tanh"}.get(given["approximate"])
    return Term(op, {"input": given["input"]}) if op else None


def layer_norm(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Ignore which kernel computes it."""
    return Term("layer_norm", {name: value for name, value in given.items() if name != "cudnn_enable"})


def mean(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read only means over the last dimension that keep it and the dtype."""
    source = meta(given["input"])
    dims = given["dim"] if isinstance(given["dim"], (tuple, list)) else (given["dim"],)
    last = source is not None and len(dims) == 1 and dims[0] in (-1, source.dim() - 1)
    if not last or given["keepdim"] is not True or given["dtype"] is not None:
        return None
    return Term("mean", {"input": given["input"]})


def var(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read only biased variances over the last dimension that keep it."""
    last = given["dim"] in (-1, [-1], (-1,)) and given["keepdim"] is True and given["unbiased"] is False
    return Term("var", {"input": given["input"]}) if last else None


def matmul(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read `x @ W.T` as a linear layer without bias."""
    right = terms.term(given["other"])
    weight = meta(right.args["input"]) if right is not None and right.op == "transposed" else None
    if right is None or weight is None:
        return Term("matmul", given)
    return Term("linear", {"input": given["input"], "weight": right.args["input"], "bias": None})


def attribute(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read `T` and `mT` of a matrix as its transpose, and `mT` of a stack of matrices as `mT`, which no linear layer
    reads."""
    source = meta(given["input"])
    if source is None or given["name"] not in ("T", "mT"):
        return None
    if source.dim() == 2:
        return Term("transposed", {"input": given["input"]})
    return Term("mT", {"input": given["input"]}) if given["name"] == "mT" and source.dim() > 2 else None


def t(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read `t()` as the attribute `T`."""
    return attribute(terms, node, {"input": given["input"], "name": "T"})


def transpose(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read the transpose of the last two dimensions as the attribute `mT`."""
    source, dims = meta(given["input"]), (given["dim0"], given["dim1"])
    if source is None or source.dim() < 2 or not all(isinstance(dim, int) for dim in dims):
        return None
    last = {dim % source.dim() for dim in dims} == {source.dim() - 2, source.dim() - 1}
    return attribute(terms, node, {"input": given["input"], "name": "mT"}) if last else None


def grouped_mm(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read only products of sorted rows with a stack of matrices, without further arguments."""
    plain = given["bias"] is None and given["out_dtype"] is None and given["offs"] is not None
    return Term("grouped_mm", {name: given[name] for name in ("input", "mat2", "offs")}) if plain else None


def cat(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read only what joins along the last dimension."""
    return _joined("cat", node, given)


def stack(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read only what joins along a new last dimension."""
    return _joined("stack", node, given)


def _joined(op: str, node: fx.Node, given: dict[str, Any]) -> Term | None:
    result, tensors = meta(node), given["tensors"]
    last = result is not None and given["dim"] in (-1, result.dim() - 1) and isinstance(tensors, (tuple, list))
    return Term(op, {"tensors": tuple(tensors)}) if last else None


def log_softmax(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read only what normalizes the last dimension; the dtype is that of the result."""
    return Term("log_softmax", {"input": given["input"]}) if _is_last(given["dim"], meta(given["input"])) else None


def gather(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read only what picks entries of the last dimension."""
    last = _is_last(given["dim"], meta(given["input"])) and not given["sparse_grad"]
    return Term("gather", {"input": given["input"], "index": given["index"]}) if last else None


def unsqueeze(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read only a new last dimension."""
    return Term("unsqueeze", {"input": given["input"]}) if _is_last(given["dim"], meta(node)) else None


def squeeze(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read only the removal of a last dimension of size one."""
    source = meta(given["input"])
    last = source is not None and _is_last(given["dim"], source) and known_equal(source.shape[-1], 1)
    return Term("squeeze", {"input": given["input"]}) if last else None


def _is_last(dim: Any, tensor: torch.Tensor | None) -> bool:
    return tensor is not None and not isinstance(dim, fx.Node) and dim in (-1, tensor.dim() - 1)


def flatten(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read only the flattening of the last two dimensions, which undoes a stack on the last."""
    source = meta(given["input"])
    pairs = source is not None and given["start_dim"] in (-2, source.dim() - 2)
    pairs = pairs and source is not None and given["end_dim"] in (-1, source.dim() - 1)
    return Term("flatten", {"input": given["input"]}) if pairs else None


def getitem(terms: Terms, node: fx.Node, given: dict[str, Any]) -> Term | None:
    """Read slices of the last dimension, with bounds resolved, and pieces of `chunk` and `split` as slices."""
    source, index = given["input"], given["index"]
    if isinstance(source, fx.Node) and isinstance(index, int) and meta(source) is None:
        return _piece(terms, node, source, index)
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
    return _sliced(given["input"], tensor, last)


def _piece(terms: Terms, node: fx.Node, source: fx.Node, index: int) -> Term | None:
    """An element of `chunk` or `split` over the last dimension is a slice."""
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
    return _sliced(whole, tensor, slice(start, start + piece.shape[-1]))


def _sliced(source: Any, tensor: torch.Tensor, part: slice) -> Term | None:
    """A slice of the last dimension with bounds resolved; the full one is an identity."""
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


def _is_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 1


def _keeps_dtype(node: fx.Node, source: Any) -> bool:
    before, after = meta(source), meta(node)
    return before is not None and after is not None and before.dtype == after.dtype and same_shape(before, after)
