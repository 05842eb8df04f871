"""How PyTorch spells the operations that patterns speak of: one line per operation.

`spell("add", "input other alpha=1", operator.add, torch.add, "add")` says that those two functions and that method are
the same canonical operation, and what their arguments are called. Strings are method names, or, with a dot in them,
operators of libraries that need not be installed. A call that does not fit the signature (say, `out=`) is left opaque,
and patterns never see it.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx


@dataclass(frozen=True)
class Spelling:
    """A canonical operation and the names and defaults of its arguments."""

    op: str
    names: tuple[str, ...]
    defaults: dict[str, Any]

    def bind(self, node: fx.Node) -> dict[str, Any] | None:
        """The node's arguments by name, or None if the call does not fit the signature."""
        if len(node.args) > len(self.names):
            return None
        bound = dict(self.defaults)
        bound.update(zip(self.names, node.args, strict=False))
        for name, value in node.kwargs.items():
            if name not in self.names:
                return None
            bound[name] = value
        return bound if len(bound) == len(self.names) else None


_FUNCTIONS: dict[Any, Spelling] = {}
_METHODS: dict[str, Spelling] = {}
_OPERATORS: dict[str, Spelling] = {}


def spell(op: str, signature: str, *spellings: Callable[..., Any] | str) -> None:
    """Registers spellings (callables, or as strings method names and operators) of the canonical operation `op`.

    The signature lists argument names; `name=value` gives a default, a literal of Python or a bare word.
    """
    names, defaults = [], {}
    for item in signature.split():
        name, equals, value = item.partition("=")
        names.append(name)
        if equals:
            defaults[name] = _literal(value)
    spelling = Spelling(op, tuple(names), defaults)
    for target in spellings:
        if isinstance(target, str):
            (_OPERATORS if "." in target else _METHODS)[target] = spelling
        else:
            _FUNCTIONS[target] = spelling


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except ValueError:  # a bare word
        return text


def spelling_of(node: fx.Node) -> Spelling | None:
    """The spelling of a call node, or None if the table does not know its target."""
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
spell("dropout", "input p train", torch.dropout)
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
