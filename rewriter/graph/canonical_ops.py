"""The declarations of canonical operations, which patterns match.

    canonical("silu", "input", call("input inplace=False", F.silu), fresh=True)

declares that patterns see `silu(input)`; that a model writes it as `F.silu`, which has one more argument; and that it
returns a new tensor and has no effects. A spelling is a function, the name of a method, or a name with a dot: an
operator of a library that need not be installed. A call that does not fit its signature (such as one with `out=`), or
whose further arguments differ from their defaults (`inplace=True`), is opaque: no pattern sees it.

An argument that a pattern does not mention must have its default, which is declared here.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F

from fastlora.compat.dispatch import grouped_mm as torch_grouped_mm
from fastlora.graph import readers
from fastlora.graph.spelling import (
    call,
    canonical,
    operation,
    operations,
    seen_instead,
    signature_of,
    spell,
    spelling_of,
)

__all__ = ["operation", "operations", "seen_instead", "signature_of", "spell", "spelling_of"]

_SLICE = "slice, of the last dimension"
_TRANSPOSED = "transposed, of a matrix, or mT, of a stack of them"
_COPY = "what they copy"

# Arithmetic
canonical(
    "add",
    "input other",
    call("input other alpha=1", torch.add, "add"),
    operator.add,
    inplace=(operator.iadd, "add_"),
    fresh=True,
    read=readers.sum_of,
)
canonical(
    "sub",
    "input other",
    call("input other alpha=1", torch.sub, "sub"),
    operator.sub,
    inplace=(operator.isub, "sub_"),
    fresh=True,
)
canonical(
    "mul",
    "input other",
    operator.mul,
    torch.mul,
    torch.multiply,
    "mul",
    "multiply",
    inplace=(operator.imul, "mul_"),
    fresh=True,
    read=readers.product,
)
canonical(
    "div",
    "input other",
    call("input other rounding_mode=None", torch.div, torch.true_divide, "div"),
    operator.truediv,
    inplace=(operator.itruediv, "div_"),
    fresh=True,
    read=readers.quotient,
)
canonical("neg", "input", operator.neg, torch.neg, torch.negative, "neg", fresh=True)
canonical("pow", "input exponent", operator.pow, torch.pow, "pow", fresh=True, read=readers.power)
canonical("square", "input", torch.square, "square", fresh=True)
canonical("sqrt", "input", torch.sqrt, "sqrt", fresh=True)
canonical("rsqrt", "input", torch.rsqrt, "rsqrt", fresh=True)
canonical("reciprocal", "input", torch.reciprocal, "reciprocal", fresh=True)

# Reductions over the last dimension, which is kept
canonical(
    "mean", "input", call("input dim keepdim=False dtype=None", torch.mean, "mean"), fresh=True, read=readers.mean
)
canonical("var", "input", call("input dim unbiased=True keepdim=False", torch.var, "var"), fresh=True, read=readers.var)
canonical("linalg_norm", "input ord=None dim=None keepdim=False dtype=None", torch.linalg.norm)

# Activations
canonical("tanh", "input", torch.tanh, F.tanh, "tanh", fresh=True)
canonical("sigmoid", "input", torch.sigmoid, F.sigmoid, "sigmoid", fresh=True)
canonical("silu", "input", call("input inplace=False", F.silu), fresh=True)
canonical("gelu", "input", call("input approximate=none", F.gelu), fresh=True, read=readers.gelu)
canonical("gelu_tanh", "input")

# Products
canonical("linear", "input weight bias=None", F.linear, fresh=True)
canonical(
    "matmul",
    "input other",
    operator.matmul,
    torch.matmul,
    "matmul",
    torch.mm,
    "mm",
    fresh=True,
    read=readers.matmul,
)
canonical(
    "addmm",
    "input mat1 mat2 beta=1 alpha=1",
    torch.addmm,
    "addmm",
    inplace=("addmm_",),
    fresh=True,
    read=readers.addmm,
    instead="linear, or the sum of a value and a linear layer",
)
canonical("baddbmm", "input batch1 batch2 beta=1 alpha=1", torch.baddbmm, "baddbmm", fresh=True)
canonical("einsum", "equation first second", torch.einsum, read=readers.einsum)
canonical(
    "grouped_mm",
    "input mat2 offs",
    call("input mat2 offs=None bias=None out_dtype=None", torch_grouped_mm, F.grouped_mm),
    fresh=True,
    ignores_autocast=True,
    read=readers.grouped_mm,
)
canonical(
    "grouped_mm_or_zero", "input mat2 offs", "transformers.grouped_mm_fallback", fresh=True, ignores_autocast=True
)

# Pieces and layouts of the last dimension
canonical(
    "cat", "tensors", call("tensors dim=0", torch.cat, torch.concat, torch.concatenate), fresh=True, read=readers.cat
)
canonical("stack", "tensors", call("tensors dim=0", torch.stack), fresh=True, read=readers.stack)
canonical("flatten", "input", call("input start_dim=0 end_dim=-1", torch.flatten, "flatten"), read=readers.flatten)
canonical("slice", "input start stop step")
canonical(
    "gather",
    "input index",
    call("input dim index sparse_grad=False", torch.gather, "gather"),
    fresh=True,
    read=readers.gather,
)
canonical("unsqueeze", "input", call("input dim", torch.unsqueeze, "unsqueeze"), read=readers.unsqueeze)
canonical("squeeze", "input", call("input dim", torch.squeeze, "squeeze"), read=readers.squeeze)
canonical("getitem", "input index", operator.getitem, read=readers.getitem, instead=_SLICE)
canonical("chunk", "input chunks dim=0", torch.chunk, "chunk", instead=_SLICE)
canonical("split", "tensor split_size_or_sections dim=0", torch.split, "split", instead=_SLICE)
canonical("transposed", "input")  # of a matrix
canonical("mT", "input", ignores_autocast=True)  # of a stack of matrices
canonical("transpose", "input dim0 dim1", torch.transpose, "transpose", read=readers.transpose, instead=_TRANSPOSED)
canonical("t", "input", torch.t, "t", read=readers.t, instead=_TRANSPOSED)
canonical("attribute", "input name", getattr, read=readers.attribute, instead=_TRANSPOSED)
canonical("reshape", "input")

canonical("view_as_complex", "input", torch.view_as_complex)
canonical("view_as_real", "input", torch.view_as_real)

# Norms, dropout and losses
canonical(
    "dropout",
    "input p",
    call("input p=0.5 training=True inplace=False", F.dropout),
    call("input p training", torch.dropout),
    read=readers.dropout,
)
canonical(
    "layer_norm",
    "input normalized_shape weight=None bias=None eps=1e-5",
    F.layer_norm,
    call("input normalized_shape weight=None bias=None eps=1e-5 cudnn_enable=True", torch.layer_norm),
    fresh=True,
    read=readers.layer_norm,
)
canonical("torch_rms_norm", "input normalized_shape weight=None eps=None", F.rms_norm, torch.rms_norm, fresh=True)
canonical(
    "log_softmax",
    "input",
    call("input dim dtype=None", torch.log_softmax, "log_softmax"),
    call("input dim=None _stacklevel=3 dtype=None", F.log_softmax),
    fresh=True,
    read=readers.log_softmax,
)
canonical(
    "cross_entropy",
    "input target weight=None size_average=None ignore_index=-100 reduce=None reduction=mean label_smoothing=0.0",
    F.cross_entropy,
    fresh=True,
)

# Copies and constants
canonical("cast", "input")
canonical("detach", "input", torch.detach, "detach")
canonical("contiguous", "input memory_format=None", "contiguous", read=readers.copy, instead=_COPY)
canonical("clone", "input memory_format=None", torch.clone, "clone", read=readers.copy, instead=_COPY)
canonical("identity", "input", instead=_COPY)
canonical("eye", "n m=None dtype=None device=None", torch.eye)
