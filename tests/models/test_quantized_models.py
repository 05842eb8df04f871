"""QLoRA: models with bitsandbytes' quantized base layers equal eager in all formats, and are fused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from quantized_models import Format, build, decoded
from tiny_models import batch, distance, relative, step

import fastlora
from fastlora.kernels.ops import dequantize_4bit

bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
FORMATS = {
    "nf4": Format(nested=False),
    "nf4 twice": Format(),
    "fp4": Format("fp4", nested=False),
    "fp4 twice": Format("fp4"),
    "blocks of 32": Format(blocksize=32),
    "blocks of 128": Format("fp4", blocksize=128),
    "stored as bfloat16": Format(storage=bf16),
    "stored as float32": Format(nested=False, storage=f32),
}
HALVES = {
    "bfloat16": Format(compute=bf16, dtype=bf16),
    "float16": Format("fp4", compute=f16, dtype=f16),
    "bfloat16 over float32": Format(compute=bf16),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs() -> dict[str, torch.Tensor]:
    return {name: value.to(DEVICE) for name, value in batch(padded=True).items()}


def unexplained(model: Any) -> list[Any]:
    return [miss for miss in fastlora.report(model).missed if miss.op == "lora"]


MODELS = [("llama", kept) for kept in FORMATS]
MODELS += [(family, kept) for family in ("qwen2", "gemma", "bert") for kept in ("nf4 twice", "fp4")]
"""All formats with one model, and all models with one format."""


@pytest.mark.parametrize(("family", "kept"), MODELS)
def test_losses_and_gradients_equal_eager(family: str, kept: str) -> None:
    model = build(family, FORMATS[kept], DEVICE)
    eager = step(model, inputs())
    fastlora.compile(model)
    compiled = step(model, inputs())
    assert relative(compiled.loss, eager.loss) < 1e-5
    assert compiled.gradients.keys() == eager.gradients.keys()
    assert max(relative(compiled.gradients[name], g) for name, g in eager.gradients.items()) < 2e-5
    assert not unexplained(model)
    assert "dequantize" not in "".join(miss.reason for miss in fastlora.report(model).missed)


def assert_as_precise_as_eager(model: Any) -> None:
    """Compile a model, and compare the errors of a step against the dequantized model in float32."""
    truth = step(decoded(model), inputs())
    eager = step(model, inputs())
    fastlora.compile(model)
    compiled = step(model, inputs())
    assert distance(compiled, truth) <= 1.25 * distance(eager, truth)
    assert not unexplained(model)


@pytest.mark.parametrize("adapters", [f32, None], ids=["float32 adapters", "adapters of its dtype"])
@pytest.mark.parametrize("kept", HALVES.values(), ids=HALVES)
def test_half_precision_is_as_precise_as_eager(kept: Format, adapters: torch.dtype | None) -> None:
    model = build("llama", kept, DEVICE, adapters or kept.dtype)
    assert_as_precise_as_eager(model)
    assert {"lora_group", "lora_linear", "lora_mlp"} <= {site.op for site in fastlora.report(model).fused}


@pytest.mark.parametrize("kept", [*FORMATS.values(), *HALVES.values()], ids=[*FORMATS, *HALVES])
def test_weights_are_decoded_to_bitsandbytes_bits(kept: Format) -> None:
    torch.manual_seed(0)
    layer: Any = kept.layer(torch.nn.Linear(256, 128, device=DEVICE, dtype=kept.dtype))
    state = layer.weight.quant_state
    nested = state.state2
    mine = dequantize_4bit(
        packed=layer.weight.data, absmax=state.absmax, blocksize=state.blocksize, quant_type=state.quant_type,
        nested_absmax=nested.absmax if nested else None, nested_code=nested.code if nested else None,
        offset=state.offset, nested_blocksize=256, rows=128, cols=256, dtype=kept.dtype,
    )  # fmt: skip
    assert torch.equal(mine, bitsandbytes.functional.dequantize_4bit(layer.weight.data, state))


@pytest.mark.parametrize("lora", [{"lora_dropout": 0.2}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_other_lora_options_are_supported(lora: dict[str, Any]) -> None:
    model = build("llama", Format(), DEVICE, **lora)
    eager = step(model.eval(), inputs())
    fastlora.compile(model)
    compiled = step(model, inputs())
    assert distance(compiled, eager) < 1e-5
    assert not unexplained(model)


@pytest.mark.parametrize("p", [0.0, 0.2] if DEVICE == "cpu" else [0.0])  # on a GPU masks differ from eager's
@pytest.mark.parametrize("nested", [False, True])
def test_dora_is_fused(nested: bool, p: float) -> None:
    model = build("llama", Format(nested=nested), DEVICE, use_dora=True, lora_dropout=p).train()
    eager = step(model, inputs())
    fastlora.compile(model, strict=True)
    compiled = step(model, inputs())
    assert compiled.gradients.keys() == eager.gradients.keys()
    assert distance(compiled, eager) < 1e-5
    report = fastlora.report(model)
    assert (report.coverage["lora"].fused, report.graphs, report.breaks) == (28, 3, [])


@pytest.mark.parametrize("kept", HALVES.values(), ids=HALVES)
def test_dora_in_half_precision_is_as_precise_as_eager(kept: Format) -> None:
    model = build("llama", kept, DEVICE, use_dora=True)
    assert_as_precise_as_eager(model)


@pytest.mark.parametrize("compute", [f32, bf16], ids=str)
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]], ids=str)
def test_autocast_equals_eager(compute: torch.dtype, targets: Any) -> None:
    """Products that are not fused keep bitsandbytes' backward, for gradients of any dtype."""
    model = build("llama", Format(compute=compute), DEVICE, target_modules=targets)
    truth = step(decoded(model), inputs())
    eager = step(model, inputs(), autocast=bf16, device=DEVICE)
    fastlora.compile(model)
    compiled = step(model, inputs(), autocast=bf16, device=DEVICE)
    assert distance(compiled, truth) <= 1.25 * distance(eager, truth)
    assert "lora_add" not in {site.op for site in fastlora.report(model).fused}


def test_a_quantized_layer_is_fused_like_a_plain_one() -> None:
    model = build("llama", Format(), DEVICE)
    fastlora.compile(model, strict=True, verify=True)
    step(model, inputs())
    report = fastlora.report(model)
    found = {site.op for site in report.fused}
    assert {"rms_norm", "add_rms_norm", "lora_group", "lora_linear", "lora_mlp", "rotary_group"} <= found
    assert report.graphs <= 3
    assert not report.breaks


def test_8_bit_layers_run_unchanged() -> None:
    model = build("llama", Format("int8"), DEVICE)
    eager = step(model, inputs())
    fastlora.compile(model)
    compiled = step(model, inputs())
    assert distance(compiled, eager) < 1e-4
    if DEVICE == "cpu":  # on a GPU the shapes of outliers depend on data, which cuts blocks into pieces
        assert fastlora.report(model).coverage["lora"].fused == 14


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_4_bit_model_can_be_trained_saved_and_loaded(tmp_path: Path, reentrant: bool) -> None:
    """By the public API of transformers and PEFT."""
    from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
    from quantized_models import FAMILIES, WIDTHS
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

    torch.manual_seed(0)
    LlamaForCausalLM(LlamaForCausalLM.config_class(**FAMILIES["llama"][1] | WIDTHS)).save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)

    def load() -> Any:
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, device_map=DEVICE)
        return prepare_model_for_kbit_training(base, gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    losses: list[list[float]] = []
    for compiled in (False, True):
        torch.manual_seed(1)
        model = get_peft_model(load(), lora).train()
        if compiled:
            fastlora.compile(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        losses.append([])
        for _ in range(4):
            loss = model(**inputs()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[1][-1] < losses[1][0]
    assert fastlora.report(model).coverage["lora"].fused == 6
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter").train()  # in evaluation, the CPU uses other kernels
    with torch.no_grad():
        assert torch.allclose(again(**inputs()).loss, model(**inputs()).loss, rtol=1e-5)
