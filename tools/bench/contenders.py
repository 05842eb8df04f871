"""The contenders that an op is timed against: eager PyTorch, torch.compile, and kernels of other libraries.

A contender turns a case's arguments into a function without arguments that returns differentiable outputs. Other
libraries are imported on use, left out if not installed, and called as their own models call them. "bare product" is a
lower bound rather than a contender: the matrix products with the base weights and nothing else, as one product where
the layers share their input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.tools.bench.cases import Arguments, Case

Contender = Callable[[Arguments], Callable[[], Any]]
Function = Callable[..., Any]
FASTLORA, BARE_PRODUCT = "fastlora", "bare product"
NAMES = ("eager", "torch.compile", "liger", "unsloth", "bitsandbytes", BARE_PRODUCT)


def installed() -> list[str]:
    """Return the contenders whose packages are installed."""
    packages = {"liger": "liger_kernel", "unsloth": "unsloth", "bitsandbytes": "bitsandbytes"}
    return [name for name in NAMES if name not in packages or find_spec(packages[name]) is not None]


def contender(name: str, case: Case) -> Contender | None:
    """Return the contender for a case, or None if it does not have the op."""
    if name == BARE_PRODUCT:
        return _bare_product(case)
    function: Function | None
    if name == "torch.compile":
        torch._dynamo.reset()
        function = torch.compile(case.op.reference, dynamic=False)
    elif name in (FASTLORA, "eager"):
        function = case.op if name == FASTLORA else case.op.reference
    else:
        function = {"liger": _liger, "unsloth": _unsloth, "bitsandbytes": _bitsandbytes}[name](case)
    if function is None:
        return None
    return lambda arguments: partial(function, **arguments)


def _bare_product(case: Case) -> Contender | None:
    if case.op.name == "lora_linear":
        return lambda arguments: partial(F.linear, arguments["x"], arguments["weight"])
    if case.op.name == "lora_group":
        return lambda arguments: partial(F.linear, arguments["x"], torch.cat(arguments["weight"]))
    if case.op.name == "lora_mlp":
        return _bare_mlp
    return None


def _bare_mlp(arguments: Arguments) -> Callable[[], Any]:
    gate_up = torch.cat((arguments["gate_weight"], arguments["up_weight"]))
    return partial(_BareMlp.apply, arguments["x"], gate_up, arguments["down_weight"])


class _BareMlp(torch.autograd.Function):
    """The matrix products of the MLP, two in each direction. Their values have no meaning, as the activation is left
    out."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        inner = x @ gate_up.t()
        ctx.save_for_backward(inner, gate_up, down)
        return inner[:, : down.shape[1]] @ down.t()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        inner, gate_up, down = ctx.saved_tensors
        dy @ down
        return inner @ gate_up, None, None


def _liger(case: Case) -> Function | None:
    functions: dict[str, Function | None] = {
        "rms_norm": _liger_rms_norm,
        "add_rms_norm": _liger_add_rms_norm,
        "layer_norm": _liger_layer_norm,
        "rotary_group": _liger_rotary,
        "glu": _liger_glu,
        "linear_cross_entropy": _liger_linear_cross_entropy,
    }
    return functions.get(case.op.name)


def _casting_mode(offset: float) -> str:
    return "gemma" if offset else "llama"


def _liger_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, **_: Any) -> Any:
    from liger_kernel.ops import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, offset, _casting_mode(offset), False)


def _liger_add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, **_: Any
) -> Any:
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, offset, _casting_mode(offset), False)


def _liger_layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, **_: Any) -> Any:
    from liger_kernel.ops import LigerLayerNormFunction

    return LigerLayerNormFunction.apply(x, weight, bias, eps)


def _liger_rotary(x: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, **_: Any) -> Any:
    from liger_kernel.ops import LigerRopeFunction

    q, k = (t.clone() for t in x)  # it rotates its inputs in place
    return LigerRopeFunction.apply(q, k, cos[0], sin[0])


def _liger_glu(gate: torch.Tensor, up: torch.Tensor, activation: str, **_: Any) -> Any:
    from liger_kernel.ops import LigerGELUMulFunction, LigerSiLUMulFunction

    return (LigerSiLUMulFunction if activation == "silu" else LigerGELUMulFunction).apply(gate, up)


def _liger_linear_cross_entropy(
    x: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, softcap: float, **_: Any
) -> Any:
    from liger_kernel.ops import LigerFusedLinearCrossEntropyFunction

    apply = LigerFusedLinearCrossEntropyFunction.apply
    loss, *_ = apply(x, weight, labels, None, None, -100, 0.0, 0.0, "mean", softcap or None)
    return loss


def _unsloth(case: Case) -> Function | None:
    functions: dict[str, Function | None] = {
        "rms_norm": _unsloth_rms_norm,
        "lora_linear": _unsloth_lora_linear,
        "lora_group": _unsloth_lora_group if case.place == "q, k, v" else None,
        "lora_mlp": _unsloth_lora_mlp,
    }
    return functions.get(case.op.name)


class _Norm:
    """A module with the attributes that Unsloth's norm reads."""

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self.weight, self.variance_epsilon, self.eps = weight, eps, eps


def _unsloth_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float, **_: Any) -> Any:
    from unsloth.kernels import fast_rms_layernorm

    return fast_rms_layernorm(_Norm(weight, eps), x[None], gemma=bool(offset))[0]


def _unsloth_lora_linear(
    x: torch.Tensor, weight: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, **_: Any
) -> Any:
    from unsloth.kernels.fast_lora import LoRA_W

    with torch.autocast("cuda", x.dtype):
        return LoRA_W.apply(x[None], weight, None, lora_a, lora_b, scaling)[0]


def _unsloth_lora_group(
    x: torch.Tensor,
    weight: list[torch.Tensor],
    bias: list[torch.Tensor | None],
    lora_a: list[torch.Tensor],
    lora_b: list[torch.Tensor],
    scaling: list[float],
    **_: Any,
) -> Any:
    from unsloth.kernels.fast_lora import LoRA_QKV

    layers = zip(weight, lora_a, lora_b, scaling, strict=True)
    flat = [value for w, a, b, s in layers for value in (w, None, a, b, s)]
    with torch.autocast("cuda", x.dtype):
        return tuple(t[0] for t in LoRA_QKV.apply(x[None], *flat, False, None, *bias))


def _unsloth_lora_mlp(x: torch.Tensor, activation: str, **layers: Any) -> Any:
    from unsloth.kernels.fast_lora import LoRA_MLP
    from unsloth.kernels.geglu import (
        geglu_approx_backward_kernel,
        geglu_approx_forward_kernel,
        geglu_exact_backward_kernel,
        geglu_exact_forward_kernel,
    )
    from unsloth.kernels.swiglu import swiglu_DWf_DW_dfg_kernel, swiglu_fg_kernel

    functions = {
        "silu": (swiglu_fg_kernel, swiglu_DWf_DW_dfg_kernel),
        "gelu": (geglu_exact_forward_kernel, geglu_exact_backward_kernel),
        "gelu_tanh": (geglu_approx_forward_kernel, geglu_approx_backward_kernel),
    }
    names = ("weight", None, "lora_a", "lora_b", "scaling")
    flat = [name and layers[f"{layer}_{name}"] for layer in ("gate", "up", "down") for name in names]
    with torch.autocast("cuda", x.dtype):
        return LoRA_MLP.apply(x[None], *flat, *functions[activation], False)[0]


def _bitsandbytes(case: Case) -> Function | None:
    functions: dict[str, Function | None] = {"dequantize_4bit": _bitsandbytes_dequantize}
    return functions.get(case.op.name)


def _bitsandbytes_dequantize(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    nested_absmax: torch.Tensor,
    nested_code: torch.Tensor,
    offset: torch.Tensor,
    blocksize: int,
    nested_blocksize: int,
    quant_type: str,
    rows: int,
    cols: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    from bitsandbytes import functional

    outer = functional.QuantState(
        absmax=nested_absmax, blocksize=nested_blocksize, code=nested_code, dtype=torch.float32
    )
    state = functional.QuantState(
        absmax=absmax,
        shape=torch.Size((rows, cols)),
        blocksize=blocksize,
        quant_type=quant_type,
        dtype=dtype,
        offset=offset,
        state2=outer,
    )
    return functional.dequantize_4bit(packed[:, None], state)
