"""How PyTorch spells the operations that patterns speak of, and what patterns see of them: one line per operation.

`spell("add", "input other alpha=1", operator.add, torch.add, "add")` says that those two functions and that method are
the same canonical operation, and what their arguments are called. Strings are method names, or, with a dot in them,
operators of libraries that need not be installed. A call that does not fit the signature (say, `out=`) is left opaque,
and patterns never see it.

Patterns see what is spelled, unless the view reads it as something else: then `seen` and `unseen` say as what. An
argument that a pattern does not mention has its default, so these tables are what closes a pattern.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from fastlora.errors import RuleError, written_at
from fastlora.graph.signature import Signature, merge, parse

POWERS = {2: "square", -0.5: "rsqrt", 0.5: "sqrt"}
"""The powers that are operations of their own."""


@dataclass(frozen=True)
class Spelling:
    """One way to write a canonical operation."""

    op: str
    signature: Signature

    def bind(self, node: fx.Node) -> dict[str, Any] | None:
        """The node's arguments by name, those that only other spellings have included, or None if the call does not
        fit the signature."""
        names = self.signature.names
        if len(node.args) > len(names) or not all(name in names for name in node.kwargs):
            return None
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        bound = {**_MERGED[self.op].defaults, **self.signature.defaults, **given}
        missing = any(name not in given for name in self.signature.required())
        return None if missing else bound


_FUNCTIONS: dict[Any, Spelling] = {}
_METHODS: dict[Any, Spelling] = {}
_OPERATORS: dict[Any, Spelling] = {}
_MERGED: dict[str, Signature] = {}
_SEEN: dict[str, Signature] = {}
_UNSEEN: dict[str, str] = {}


def spell(op: str, signature: str, *spellings: Callable[..., Any] | str) -> None:
    """Registers spellings (callables, or as strings method names and operators) of the canonical operation `op`.

    The signature lists argument names; `name=value` gives a default, a literal of Python or a bare word. A pattern that
    does not mention an argument matches calls that leave it at its default; one without has to be mentioned.

    Raises:
        RuleError: if the signature or a spelling cannot be right, with the line that it is written in.
    """
    try:
        if not spellings:
            raise ValueError("name a function, a method or an operator that is spelled so")
        parsed = parse(signature)
        _fit_what_is_read(op, parsed)
        tables = [_table_of(op, target) for target in spellings]
        _MERGED[op] = merge([*_others(op, spellings), parsed])
    except ValueError as problem:
        raise RuleError(f"{written_at()}: spell({op!r}, {signature!r}): {problem}") from None
    for target, table in zip(spellings, tables, strict=True):
        table[target] = Spelling(op, parsed)


def _fit_what_is_read(op: str, signature: Signature) -> None:
    """What the view reads has the arguments that it knows of, as it would drop others."""
    known = _MERGED.get(op) or _SEEN.get(op)
    if known is not None and (op in _SEEN or op in _UNSEEN):
        for name in signature.names:
            if name not in known.names:
                raise ValueError(f"{op!r} has no argument {name!r}, but {known}; spell it by another name")


def _table_of(op: str, target: Any) -> dict[Any, Spelling]:
    """Where a spelling belongs, unless it is none or another operation's."""
    table = _FUNCTIONS
    if isinstance(target, str):
        table = _OPERATORS if "." in target else _METHODS
    elif not callable(target):
        raise ValueError(f"{target!r} is neither a callable nor the name of a method or an operator")
    known = table.get(target)
    if known is not None and known.op != op:
        raise ValueError(f"{target!r} is spelled {known.op!r} already, and patterns see it as that")
    return table


def _others(op: str, spellings: tuple[Any, ...]) -> list[Signature]:
    """The signatures of the other spellings of an operation."""
    tables = (_FUNCTIONS, _METHODS, _OPERATORS)
    known = ((target, spelling) for table in tables for target, spelling in table.items())
    return [spelling.signature for target, spelling in known if spelling.op == op and target not in spellings]


def seen(op: str, signature: str) -> None:
    """Declares the arguments that patterns see of an operation that the view reads, or makes of others."""
    _SEEN[op] = parse(signature)


def unseen(ops: str, instead: str) -> None:
    """Declares that patterns never see these operations, and what they see instead."""
    _UNSEEN.update(dict.fromkeys(ops.split(), instead))


def signature_of(op: str) -> Signature | None:
    """The arguments that patterns see of a canonical operation; None if they see no such operation."""
    return None if op in _UNSEEN else _SEEN.get(op) or _MERGED.get(op)


def operations() -> set[str]:
    """The canonical operations that patterns see, with those that were spelled since fastlora was imported."""
    return (_SEEN.keys() | _MERGED.keys()) - _UNSEEN.keys()


def seen_instead(op: str) -> str | None:
    """What patterns see instead of an operation that they do not."""
    return _UNSEEN.get(op)


def spelling_of(node: fx.Node) -> Spelling | None:
    """The spelling of a call node, or None if the tables do not know its target."""
    if node.op == "call_function":
        try:
            found = _FUNCTIONS.get(node.target)
        except TypeError:  # an unhashable callable
            return None
        if found is None and isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return _OPERATORS.get(str(node.target).removesuffix(".default"))
        return found
    return _METHODS.get(str(node.target)) if node.op == "call_method" else None


spell("add", "input other alpha=1", torch.add, "add")
spell("add", "input other", operator.add)
spell("sub", "input other alpha=1", torch.sub, "sub")
spell("sub", "input other", operator.sub)
spell("mul", "input other", operator.mul, torch.mul, torch.multiply, "mul", "multiply")
spell("div", "input other rounding_mode=None", torch.div, "div", torch.true_divide)
spell("div", "input other", operator.truediv)
spell("neg", "input", operator.neg, torch.neg, torch.negative, "neg")
spell("pow", "input exponent", operator.pow, torch.pow, "pow")
spell("square", "input", torch.square, "square")
spell("sqrt", "input", torch.sqrt, "sqrt")
spell("rsqrt", "input", torch.rsqrt, "rsqrt")
spell("reciprocal", "input", torch.reciprocal, "reciprocal")
spell("mean", "input dim keepdim=False dtype=None", torch.mean, "mean")
spell("var", "input dim unbiased=True keepdim=False", torch.var, "var")
spell("linalg_norm", "input ord=None dim=None keepdim=False dtype=None", torch.linalg.norm)
spell("tanh", "input", torch.tanh, F.tanh, "tanh")
spell("sigmoid", "input", torch.sigmoid, F.sigmoid, "sigmoid")
spell("silu", "input inplace=False", F.silu)
spell("gelu", "input approximate=none", F.gelu)
spell("linear", "input weight bias=None", F.linear)
spell("matmul", "input other", operator.matmul, torch.matmul, "matmul")
spell("baddbmm", "input batch1 batch2 beta=1 alpha=1", torch.baddbmm, "baddbmm")
spell("einsum", "equation first second", torch.einsum)
spell("grouped_mm", "input mat2 offs=None bias=None out_dtype=None", torch._grouped_mm, F.grouped_mm)
spell("grouped_mm_or_zero", "input mat2 offs", "transformers.grouped_mm_fallback")
spell("cat", "tensors dim=0", torch.cat, torch.concat, torch.concatenate)
spell("stack", "tensors dim=0", torch.stack)
spell("flatten", "input start_dim=0 end_dim=-1", torch.flatten, "flatten")
spell("chunk", "input chunks dim=0", torch.chunk, "chunk")
spell("split", "tensor split_size_or_sections dim=0", torch.split, "split")
spell("getitem", "input index", operator.getitem)
spell("transpose", "input dim0 dim1", torch.transpose, "transpose")
spell("t", "input", torch.t, "t")
spell("attribute", "input name", getattr)
spell("dropout", "input p=0.5 training=True inplace=False", F.dropout)
spell("dropout", "input p training", torch.dropout)
spell("layer_norm", "input normalized_shape weight=None bias=None eps=1e-5", F.layer_norm)
spell("layer_norm", "input normalized_shape weight=None bias=None eps=1e-5 cudnn_enable=True", torch.layer_norm)
spell("torch_rms_norm", "input normalized_shape weight=None eps=None", F.rms_norm, torch.rms_norm)
spell(
    "cross_entropy",
    "input target weight=None size_average=None ignore_index=-100 reduce=None reduction=mean label_smoothing=0.0",
    F.cross_entropy,
)
spell("eye", "n m=None dtype=None device=None", torch.eye)
spell("detach", "input", torch.detach, "detach")
spell("contiguous", "input memory_format=None", "contiguous")
spell("clone", "input memory_format=None", torch.clone, "clone")

# What the view reads, or makes of others: see `fastlora.graph.view`.
seen("add", "input other")
seen("sub", "input other")
seen("mul", "input other")
seen("div", "input other")
seen("pow", "input exponent")
seen("matmul", "input other")  # of what is no transposed matrix
seen("mean", "input")  # over the last dimension, which is kept; var alike
seen("var", "input")
seen("silu", "input")
seen("gelu", "input")
seen("gelu_tanh", "input")
seen("dropout", "input p")  # which is active
seen("layer_norm", "input normalized_shape weight=None bias=None eps=1e-5")
seen("grouped_mm", "input mat2 offs")
seen("transposed", "input")  # of a matrix
seen("mT", "input")  # of a stack of them
seen("cat", "tensors")  # along the last dimension, as the next three
seen("stack", "tensors")
seen("flatten", "input")
seen("slice", "input start stop step")
seen("reshape", "input")
seen("cast", "input")
unseen("transpose t attribute", "transposed, of a matrix, or mT, of a stack of them")
unseen("getitem chunk split", "slice, of the last dimension")
unseen("contiguous clone identity", "what they copy")
