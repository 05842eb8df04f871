"""A read-only canonical view of an FX graph: what each node means, and which nodes hold the same value.

Matching reads the view, never the nodes, so nothing has to be normalised in the graph, and nodes that no pattern claims
leave it bit-identical. The view does five things: it resolves spellings, recognises casts by their effect, makes
identities transparent, desugars what models write in several ways, and overlays semantic ops that rules have raised.

Metadata (`meta["example_value"]`) decides dtypes and shapes, never arguments: under autocast the two differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fastlora.graph.canonical_ops import POWERS, spelling_of
from fastlora.graph.effects import Mutations, modes
from fastlora.graph.fake_values import known_equal, meta, same_shape

CASTS = {"to", "float", "half", "bfloat16", "double", "type", "type_as"}
RESHAPES = {"view", "reshape", "view_as", "reshape_as"}


@dataclass(frozen=True)
class Term:
    """A canonical operation over nodes and constants."""

    op: str
    args: dict[str, Any]


@dataclass
class View:
    """The canonical view of one graph (one body; sub-graphs of higher-order ops have views of their own)."""

    graph: fx.Graph
    order: dict[fx.Node, float] = field(init=False)
    raised: dict[fx.Node, list[Any]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.order = {node: position for position, node in enumerate(self.graph.nodes)}
        self._same_as: dict[fx.Node, fx.Node] = {}
        self._classes: dict[fx.Node, list[fx.Node]] = {}
        self._terms: dict[fx.Node, Term | None] = {}
        self.mutations = Mutations(self.graph)
        self.modes = modes(self.graph)
        for node in self.graph.nodes:
            term = self._read(node)
            if term is not None and term.op in ("identity", "cast") and self._stops_gradients(node, term.args["input"]):
                term = None
            if term is not None and term.op == "identity" and self._is_written(node, term.args["input"]):
                term = None
            if term is not None and term.op == "identity":
                producer = self.producer(term.args["input"])
                self._same_as[node] = producer
                self._classes.setdefault(producer, [producer]).append(node)
            else:
                self._terms[node] = term

    def _stops_gradients(self, node: fx.Node, source: Any) -> bool:
        """A copy without gradients is another value."""
        before, after = meta(source), meta(node)
        if before is None or after is None:
            return False
        return before.requires_grad != after.requires_grad or (before.requires_grad and not self.modes[node][0])

    def _is_written(self, node: fx.Node, source: Any) -> bool:
        """A copy of what is written to, or one that is, may hold another value by the time it is read."""
        return bool(self.mutations.writers(node) or self.mutations.writers(source))

    # -- value classes -------------------------------------------------------------------------------------------------

    def producer(self, value: Any) -> Any:
        """The node that produced a value, seen through identities; constants stand for themselves."""
        return self._same_as.get(value, value) if isinstance(value, fx.Node) else value

    def is_identity(self, node: fx.Node) -> bool:
        """Whether a node only hands on the value of another."""
        return node in self._same_as

    def value_class(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that hold the value of `node`: its producer and the identities of it."""
        producer = self.producer(node)
        return self._classes.get(producer, [producer])

    def users(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that use a value, identities aside."""
        same = self.value_class(node)
        return [user for member in same for user in member.users if self._same_as.get(user) is not same[0]]

    def term(self, value: Any) -> Term | None:
        """The meaning of the node that produced a value, or None if the view does not know it."""
        return self._terms.get(self._same_as.get(value, value)) if isinstance(value, fx.Node) else None

    def producers(self) -> list[fx.Node]:
        """Every node that is not an identity, in graph order."""
        return list(self._terms)

    # -- reading a node ------------------------------------------------------------------------------------------------

    def _read(self, node: fx.Node) -> Term | None:
        if node.op == "call_method" and node.target in CASTS:
            return self._cast(node)
        if node.op == "call_method" and node.target in RESHAPES:
            return self._reshaped(node)
        spelling = spelling_of(node)
        bound = spelling.bind(node) if spelling is not None else None
        if spelling is None or bound is None:
            return None
        reader = getattr(self, f"_read_{spelling.op}", None)
        return reader(node, bound) if reader is not None else Term(spelling.op, bound)

    def _cast(self, node: fx.Node) -> Term | None:
        source, result = meta(node.args[0]), meta(node)
        if source is None or result is None or source.device != result.device or not same_shape(source, result):
            return None
        if source.dtype == result.dtype:
            return Term("identity", {"input": node.args[0]})
        floating = source.is_floating_point() and result.is_floating_point()
        return Term("cast", {"input": node.args[0]}) if floating else None

    def _reshaped(self, node: fx.Node) -> Term | None:
        source, result = meta(node.args[0]), meta(node)
        if source is None or result is None or source.dtype != result.dtype:
            return None
        if same_shape(source, result):
            return Term("identity", {"input": node.args[0]})
        stack = self.term(node.args[0])
        kept = zip(source.shape[:-2], result.shape[:-1], strict=False)
        unstacks = stack is not None and stack.op == "stack" and result.dim() == source.dim() - 1
        joins = unstacks and all(known_equal(a, b) for a, b in kept)  # what was stacked, and what it was stacked on
        return Term("flatten" if joins else "reshape", {"input": node.args[0]})

    def _read_contiguous(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        return Term("identity", {"input": bound["input"]})

    _read_clone = _read_contiguous

    def _read_dropout(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        if bound["inplace"]:
            return None
        if bound["training"] is False or bound["p"] == 0.0:
            return Term("identity", {"input": bound["input"]})
        return Term("dropout", {"input": bound["input"], "p": bound["p"]})

    def _read_add(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        return Term("add", bound) if bound.pop("alpha") == 1 else None

    def _read_sub(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        return Term("sub", bound) if bound.pop("alpha") == 1 else None

    def _read_mul(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        left, right = self.producer(bound["input"]), self.producer(bound["other"])
        if left is right and isinstance(left, fx.Node):
            return Term("square", {"input": bound["input"]})
        for factor, other in ((left, bound["other"]), (right, bound["input"])):
            if _is_one(factor) and self._keeps_dtype(node, other):
                return Term("identity", {"input": other})
        return Term("mul", bound)

    def _read_div(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        if bound.pop("rounding_mode") is not None:
            return None
        if _is_one(bound["other"]) and self._keeps_dtype(node, bound["input"]):
            return Term("identity", {"input": bound["input"]})
        return Term("div", bound)

    def _read_pow(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        exponent = bound["exponent"]
        if isinstance(exponent, (int, float)) and exponent in POWERS and isinstance(bound["input"], fx.Node):
            return Term(POWERS[exponent], {"input": bound["input"]})
        return Term("pow", bound)

    def _read_silu(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        return None if bound.pop("inplace") else Term("silu", bound)

    def _read_gelu(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        op = {"none": "gelu", "tanh": "gelu_tanh"}.get(bound["approximate"])
        return Term(op, {"input": bound["input"]}) if op else None

    def _read_layer_norm(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        """Which kernel computes it is no part of what it means."""
        return Term("layer_norm", {name: value for name, value in bound.items() if name != "cudnn_enable"})

    def _read_mean(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        """Only the mean over the last dimension, which keeps it, has a meaning that patterns use."""
        source = meta(bound["input"])
        dims = bound["dim"] if isinstance(bound["dim"], (tuple, list)) else (bound["dim"],)
        last = source is not None and len(dims) == 1 and dims[0] in (-1, source.dim() - 1)
        if not last or bound["keepdim"] is not True or bound["dtype"] is not None:
            return None
        return Term("mean", {"input": bound["input"]})

    def _read_var(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        last = bound["dim"] in (-1, [-1], (-1,)) and bound["keepdim"] is True and bound["unbiased"] is False
        return Term("var", {"input": bound["input"]}) if last else None

    def _read_matmul(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        """`x @ W.T` is a linear layer without bias."""
        right = self.term(bound["other"])
        weight = meta(right.args["input"]) if right is not None and right.op == "transposed" else None
        if right is None or weight is None:
            return Term("matmul", bound)
        return Term("linear", {"input": bound["input"], "weight": right.args["input"], "bias": None})

    def _read_attribute(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        """Of a matrix the transpose; `mT`, of a stack of them, stands apart, as no linear layer reads one."""
        source = meta(bound["input"])
        if source is None or bound["name"] not in ("T", "mT"):
            return None
        if source.dim() == 2:
            return Term("transposed", {"input": bound["input"]})
        return Term("mT", {"input": bound["input"]}) if bound["name"] == "mT" and source.dim() > 2 else None

    def _read_t(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        return self._read_attribute(node, {"input": bound["input"], "name": "T"})

    def _read_transpose(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        source, dims = meta(bound["input"]), (bound["dim0"], bound["dim1"])
        if source is None or source.dim() < 2 or not all(isinstance(dim, int) for dim in dims):
            return None
        last = {dim % source.dim() for dim in dims} == {source.dim() - 2, source.dim() - 1}
        return self._read_attribute(node, {"input": bound["input"], "name": "mT"}) if last else None

    def _read_grouped_mm(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        plain = bound["bias"] is None and bound["out_dtype"] is None and bound["offs"] is not None
        return Term("grouped_mm", {name: bound[name] for name in ("input", "mat2", "offs")}) if plain else None

    def _read_cat(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        return self._joined("cat", node, bound)

    def _read_stack(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        return self._joined("stack", node, bound)

    def _joined(self, op: str, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        """Only what joins along the last dimension."""
        result, tensors = meta(node), bound["tensors"]
        last = result is not None and bound["dim"] in (-1, result.dim() - 1) and isinstance(tensors, (tuple, list))
        return Term(op, {"tensors": tuple(tensors)}) if last else None

    def _read_flatten(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        """Only the flattening of the last two dimensions, which undoes a stack on the last."""
        source = meta(bound["input"])
        pairs = source is not None and bound["start_dim"] in (-2, source.dim() - 2)
        pairs = pairs and source is not None and bound["end_dim"] in (-1, source.dim() - 1)
        return Term("flatten", {"input": bound["input"]}) if pairs else None

    def _read_getitem(self, node: fx.Node, bound: dict[str, Any]) -> Term | None:
        source, index = bound["input"], bound["index"]
        if isinstance(source, fx.Node) and isinstance(index, int) and meta(source) is None:
            return self._piece(node, source, index)
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
        return _sliced(bound["input"], tensor, last)

    def _piece(self, node: fx.Node, source: fx.Node, index: int) -> Term | None:
        """An element of `chunk` or `split` over the last dimension is a slice."""
        term, piece = self.term(source), meta(node)
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

    def _keeps_dtype(self, node: fx.Node, source: Any) -> bool:
        before, after = meta(source), meta(node)
        return before is not None and after is not None and before.dtype == after.dtype and same_shape(before, after)


def _is_one(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == 1


def _is_full(part: slice) -> bool:
    return part.start in (None, 0) and part.stop is None and part.step in (None, 1)


def _sliced(source: Any, tensor: torch.Tensor, part: slice) -> Term | None:
    """A slice of the last dimension with bounds resolved; the full one is an identity."""
    size = tensor.shape[-1]
    if not isinstance(size, int) or not all(
        p is None or isinstance(p, int) for p in (part.start, part.stop, part.step)
    ):
        return Term("identity", {"input": source}) if _is_full(part) else None
    start, stop, step = part.indices(size)
    if (start, stop, step) == (0, size, 1):
        return Term("identity", {"input": source})
    return Term("slice", {"input": source, "start": start, "stop": stop, "step": step})
