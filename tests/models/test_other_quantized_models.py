"""Adapters on quantized base layers of other libraries equal eager, and are fused with the layer's output.

The layers are those of torchao, of packages that are tested if installed, and one that is defined here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from quantized_models import WIDTHS, fill
from tiny_models import FAMILIES, batch, distance, relative, step
from torch import Tensor, nn

import fastlora

Quantize = Callable[[nn.Linear], nn.Module]
f16, bf16, f32 = torch.float16, torch.bfloat16, torch.float32
GROUP = 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Coded(torch.autograd.Function):
    """A product with int8 weights, scaled row by row, with a hand-written backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return F.linear(x, codes.to(x.dtype)) * scales.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        codes, scales = ctx.saved_tensors
        return (gradient * scales.to(gradient.dtype)) @ codes.to(gradient.dtype), None, None


class CodedLinear(nn.Linear):
    """A user-defined linear layer with quantized weights, which PEFT treats as a plain one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, dtype=linear.weight.dtype)
        scales = linear.weight.abs().amax(dim=1) / 127
        codes = (linear.weight / scales[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        return Coded.apply(x, self.weight, self.scales)  # type: ignore[no-any-return]


def by_torchao(name: str, **options: Any) -> Quantize:
    def quantize(linear: nn.Linear) -> nn.Module:
        api: Any = pytest.importorskip("torchao.quantization")
        if "granularity" in options:
            options["granularity"] = api.PerGroup(GROUP)
        holder = nn.Sequential(linear)
        api.quantize_(holder, getattr(api, name)(**options))
        return holder[0]

    return quantize


def by_hqq(bits: int) -> Quantize:
    def quantize(linear: nn.Linear) -> nn.Module:
        hqq: Any = pytest.importorskip("hqq.core.quantize")
        config = hqq.BaseQuantizeConfig(nbits=bits, group_size=GROUP)
        made: nn.Module = hqq.HQQLinear(linear, config, compute_dtype=linear.weight.dtype, device="cpu")
        return made

    return quantize


def _codes(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return scales and zero points of symmetric 4-bit groups."""
    groups = linear.weight.data.float().view(linear.out_features, -1, GROUP)
    scales = (groups.abs().amax(-1) / 7).to(linear.weight.dtype).float()
    return scales, torch.full_like(scales, 8)


def _of_gptqmodel(module: str, name: str, linear: nn.Linear, **options: Any) -> Any:
    layers: Any = pytest.importorskip(f"gptqmodel.nn_modules.qlinear.{module}")
    return getattr(layers, name)(
        bits=4, group_size=GROUP, desc_act=False, in_features=linear.in_features, out_features=linear.out_features,
        **options,
    )  # fmt: skip


def by_gptq(linear: nn.Linear) -> nn.Module:
    made = _of_gptqmodel("torch", "TorchLinear", linear, sym=True)
    made.pack(linear, *_codes(linear), (torch.arange(linear.in_features) // GROUP).int())
    made.scales = made.scales.to(linear.weight.dtype)
    made.post_init()
    return made  # type: ignore[no-any-return]


def by_awq(linear: nn.Linear) -> nn.Module:
    dtype = linear.weight.dtype
    made = _of_gptqmodel("torch_awq", "AwqTorchLinear", linear, sym=False, dtype=dtype)
    scales, zeros = _codes(linear)
    made.pack(copy.deepcopy(linear).float(), scales.to(dtype), zeros.to(dtype))
    made.post_init()
    return made  # type: ignore[no-any-return]


INT8, FLOAT8 = by_torchao("Int8WeightOnlyConfig"), by_torchao("Float8WeightOnlyConfig")
INT8_DYNAMIC = by_torchao("Int8DynamicActivationInt8WeightConfig")
INT4 = by_torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=None)
IN_FLOAT32: dict[str, Quantize] = {
    "torchao int8": INT8, "torchao float8": FLOAT8, "torchao int4": INT4, "torchao int8 dynamic": INT8_DYNAMIC,
    "hqq 4": by_hqq(4), "hqq 8": by_hqq(8), "of one's own": CodedLinear,
}  # fmt: skip
HALVES: dict[str, tuple[torch.dtype, Quantize]] = {
    "torchao int8": (bf16, INT8), "torchao float8": (bf16, FLOAT8), "torchao int4": (bf16, INT4),
    "hqq 4": (bf16, by_hqq(4)), "gptq": (f16, by_gptq), "awq": (bf16, by_awq), "of one's own": (bf16, CodedLinear),
}  # fmt: skip


def build(quantize: Quantize, dtype: torch.dtype = f32, **lora: Any) -> Any:
    """Build a tiny Llama with float32 adapters on quantized layers; no B is zero, so that no gradient is."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaForCausalLM.config_class(**FAMILIES["llama"][1] | WIDTHS)).to(dtype)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if name.endswith(tuple(TARGETS)):
            model.set_submodule(name, quantize(module))
    model = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **lora}))
    return fill(model).train()


def decoded(model: Any) -> Any:
    """Return the model with plain float32 layers, computed by applying the quantized ones to an identity matrix."""
    model = copy.deepcopy(model)
    dtype = model.get_input_embeddings().weight.dtype
    for module in [each for each in model.modules() if hasattr(each, "lora_A")]:
        rows, width = module.lora_B["default"].out_features, module.lora_A["default"].in_features
        plain = nn.Linear(width, rows, bias=False)
        with torch.no_grad():
            plain.weight.copy_(module.get_base_layer()(torch.eye(width, dtype=dtype)).T)
        for place in ("base_layer", "quant_linear_module"):  # some of PEFT's layers have this name as well
            if hasattr(module, place):
                setattr(module, place, plain.requires_grad_(False))
    return model.float()


def assert_fused(model: Any, sites: int) -> None:
    report = fastlora.report(model)
    assert (report.coverage["lora"].fused, report.coverage["lora"].seen) == (sites, sites)
    assert not [miss for miss in report.missed if miss.op == "lora"]
    assert not report.breaks
    assert report.graphs <= 3


@pytest.mark.parametrize("quantize", IN_FLOAT32.values(), ids=IN_FLOAT32)
def test_losses_and_gradients_equal_eager(quantize: Quantize) -> None:
    model = build(quantize, lora_dropout=0.2)
    eager = step(model, batch(padded=True))
    fastlora.compile(model)
    compiled = step(model, batch(padded=True))
    assert relative(compiled.loss, eager.loss) < 1e-5
    assert compiled.gradients.keys() == eager.gradients.keys()
    assert max(relative(compiled.gradients[name], g) for name, g in eager.gradients.items()) < 2e-5
    assert_fused(model, 14)


@pytest.mark.parametrize(("dtype", "quantize"), HALVES.values(), ids=HALVES)
def test_half_precision_is_as_precise_as_eager(dtype: torch.dtype, quantize: Quantize) -> None:
    model = build(quantize, dtype)
    batches = [batch(padded=True, seed=seed) for seed in range(3)]
    truths = [step(decoded(model), inputs) for inputs in batches]
    eager = [step(model, inputs) for inputs in batches]
    fastlora.compile(model)
    compiled = [step(model, inputs) for inputs in batches]
    mine, its = (sum(map(distance, found, truths)) for found in (compiled, eager))
    assert mine <= 1.25 * its
    assert_fused(model, 14)


@pytest.mark.parametrize("quantize", [INT8, by_hqq(4)], ids=["torchao int8", "hqq 4"])
def test_dora_is_fused(quantize: Quantize) -> None:
    model = build(quantize, use_dora=True)
    eager = step(model, batch())
    fastlora.compile(model)
    compiled = step(model, batch())
    assert compiled.gradients.keys() == eager.gradients.keys()
    assert max(relative(compiled.gradients[name], g) for name, g in eager.gradients.items()) < 2e-5
    assert_fused(model, 28)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers_equal_eager(reentrant: bool) -> None:
    model = build(CodedLinear, lora_dropout=0.2)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    eager = step(model, batch())
    fastlora.compile(model)
    compiled = step(model, batch())
    assert max(relative(compiled.gradients[name], g) for name, g in eager.gradients.items()) < 2e-5
    assert_fused(model, 14)


def test_layers_without_a_backward_equal_eager() -> None:
    """torchao's products of quantized activations have no backward; only adapters and residuals give gradients."""
    layer = INT8_DYNAMIC(nn.Linear(64, 64, bias=False).requires_grad_(False))
    assert not layer(torch.randn(3, 64, requires_grad=True)).requires_grad
