"""Ways to train: what PEFT can be set to, and what a loop does around a step.

The plain one is LoRA on all linear layers but the output head, in evaluation mode, in float32. Each of the others
changes one thing about it.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlora.tools.zoo.quantised import quantise

RANK = 4
PACKED = 8
"""Tokens of each sequence in a packed row."""

Batch = dict[str, torch.Tensor]
Adapt = Callable[[nn.Module, list[str]], nn.Module]


def lora(**options: Any) -> Adapt:
    """LoRA on the named layers, with further options of PEFT's."""

    def adapt(base: nn.Module, names: list[str]) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(
            base, LoraConfig(**{"r": RANK, "lora_alpha": 2 * RANK, "target_modules": names, **options})
        )

    return adapt


def other(config: str, **options: Any) -> Adapt:
    """Another of PEFT's tuners."""

    def adapt(base: nn.Module, names: list[str]) -> nn.Module:
        import peft

        return peft.get_peft_model(base, getattr(peft, config)(target_modules=names, **options))

    return adapt


def _mixed(base: nn.Module, names: list[str]) -> nn.Module:
    ranks = {name: 2 + i % 5 for i, name in enumerate(names)}
    alphas = {name: 3 + i % 4 for i, name in enumerate(names)}
    return lora(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=True)(base, names)


def _two(base: nn.Module, names: list[str]) -> nn.Module:
    from peft import LoraConfig

    model: Any = lora()(base, names)
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=names))
    model.base_model.set_adapter(["default", "second"])
    return model


def _switched(base: nn.Module, names: list[str]) -> nn.Module:
    model: Any = _two(base, names)
    model.set_adapter("second")
    return model


def _names_of(base: nn.Module, *modules: nn.Module | None) -> list[str]:
    return [name for name, module in base.named_modules() if module in modules]


def _everything(base: Any, names: list[str]) -> nn.Module:
    """The embeddings and the head as well."""
    return lora()(base, [*names, *_names_of(base, base.get_input_embeddings(), base.get_output_embeddings())])


def _head_too(base: Any, names: list[str]) -> nn.Module:
    return lora(modules_to_save=_names_of(base, base.get_output_embeddings()))(base, names)


def _first_layer(base: nn.Module, names: list[str]) -> nn.Module:
    return lora()(base, [name for name in names if ".0." in name])


def _every_other(base: nn.Module, names: list[str]) -> nn.Module:
    """Every other layer, so that groups are incomplete."""
    return lora()(base, names[::2])


def _experts(base: nn.Module, names: list[str]) -> nn.Module:
    """The parameters that hold the matrices of all experts as well, where there are some."""
    stacked = [name for name, p in base.named_parameters() if p.dim() == 3 and ".experts." in name]
    return lora(target_parameters=stacked or None)(base, names)


def _full(base: nn.Module, names: list[str]) -> nn.Module:
    return base.requires_grad_(True)


def _quantised(base: nn.Module, names: list[str]) -> nn.Module:
    return lora()(quantise(base, names), names)


def _explain_variance(model: nn.Module, inputs: Batch) -> None:
    """EVA: each A is made of the directions in which what its layer reads varies most, and ranks go where they do."""
    from peft import initialize_lora_eva_weights

    def rows(layer_input: Any, inputs: Any, name: str) -> torch.Tensor:
        given: torch.Tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
        return given.flatten(end_dim=-2)

    initialize_lora_eva_weights(
        model, [inputs], prepare_model_inputs_fn=None, prepare_layer_inputs_fn=rows, show_progress_bar=False
    )


def _prefix(base: nn.Module, names: list[str]) -> nn.Module:
    from peft import PrefixTuningConfig, get_peft_model

    return get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def _as_it_is(inputs: Batch) -> Batch:
    return inputs


def _padded(left: bool) -> Callable[[Batch], Batch]:
    def pad(inputs: Batch) -> Batch:
        made = {name: value.clone() for name, value in inputs.items()}
        where = slice(None, 5) if left else slice(-5, None)
        for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            made[name][0, where] = filler
        return made

    return pad


def _positions(inputs: Batch) -> Batch:
    """Several sequences in a row, which only their positions tell apart, and only without a KV cache."""
    rows, length = inputs["input_ids"].shape
    positions = (torch.arange(length) % PACKED).expand(rows, length)
    return {"input_ids": inputs["input_ids"], "labels": inputs["labels"], "position_ids": positions}


def _packed(inputs: Batch) -> Batch:
    return {**_positions(inputs), "use_cache": False}  # type: ignore[dict-item]


def _live(model: Any, inputs: Batch) -> None:
    """What users do between two steps."""
    tokens = {name: value for name, value in inputs.items() if name != "labels"}
    model(**inputs).loss.backward()
    model.zero_grad()
    with torch.no_grad():
        model(**inputs)
    with torch.inference_mode():
        model(**inputs)
    if model.get_base_model().can_generate():
        model.generate(**tokens, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    copy.deepcopy(model)(**inputs).loss.backward()
    torch.save(model.state_dict(), kept := io.BytesIO())
    kept.seek(0)
    model.load_state_dict(torch.load(kept))


@dataclass(frozen=True)
class Way:
    """How a tiny model is trained.

    Attributes:
        does: what it changes, for a page.
        adapt: makes the model that is trained of the base model and the names of its linear layers.
        inputs: makes the batch of the plain one.
        initialise: is called with the adapted model and its batch before anything else, where adapters begin with data.
        initialised: whether adapters stay as PEFT made them.
        training: whether dropout is active.
        dtype: of the base model; adapters are float32.
        autocast: the dtype of autocast, if it is on.
        reentrant: with gradient checkpointing, of one kind or the other.
        between: is called with the compiled model before its step.
    """

    name: str
    does: str
    adapt: Adapt = lora()  # noqa: RUF009  (a function)
    inputs: Callable[[Batch], Batch] = _as_it_is
    initialise: Callable[[nn.Module, Batch], None] | None = None
    initialised: bool = False
    training: bool = False
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    reentrant: bool | None = None
    between: Callable[[nn.Module, Batch], None] | None = None

    @property
    def rounds(self) -> bool:
        """Whether eager's own rounding is what errors are measured by."""
        return self.dtype is not torch.float32 or self.autocast is not None


PLAIN = Way("plain", "LoRA on all linear layers but the head, evaluation mode, float32")
WAYS = {
    way.name: way
    for way in (
        PLAIN,
        Way("dropout", "dropout in the model and in front of adapters", lora(lora_dropout=0.2), training=True),
        Way("checkpointing", "gradient checkpointing without reentry", training=True, reentrant=False),
        Way("reentrant", "gradient checkpointing with reentry", training=True, reentrant=True),
        Way("left-padding", "a sequence padded on the left", inputs=_padded(left=True)),
        Way("right-padding", "a sequence padded on the right", inputs=_padded(left=False)),
        Way("packed", "several sequences in a row, told apart by position_ids", inputs=_packed),
        Way("positions", "position_ids, and a KV cache as by default", inputs=_positions),
        Way("bfloat16", "a bfloat16 base with float32 adapters", dtype=torch.bfloat16),
        Way("autocast", "bfloat16 autocast over float32", autocast=torch.bfloat16),
        Way("both", "bfloat16 autocast over a bfloat16 base", dtype=torch.bfloat16, autocast=torch.bfloat16),
        Way("nf4", "base layers in NF4, quantised twice; dropout in the model", _quantised, training=True),
        Way("full", "no adapters, everything is trained", _full),
        Way("mixed-ranks", "rank_pattern, alpha_pattern and rsLoRA", _mixed),
        Way("lora-bias", "a bias in B", lora(lora_bias=True)),
        Way("biases", "the base's biases are trained as well", lora(bias="all")),
        Way("dora", "DoRA", lora(use_dora=True)),
        Way("pissa", "PiSSA initialisation", lora(init_lora_weights="pissa"), initialised=True),
        Way("olora", "OLoRA initialisation", lora(init_lora_weights="olora"), initialised=True),
        Way("two-adapters", "two adapters are active", _two),
        Way("switched", "the second of two adapters is active", _switched),
        Way("everything", "LoRA on embeddings and the output head as well", _everything),
        Way("head-too", "the output head is trained, in modules_to_save", _head_too),
        Way("first-layer", "LoRA in the first layer only", _first_layer),
        Way("every-other", "LoRA on every other linear layer", _every_other),
        Way("adalora", "AdaLoRA", other("AdaLoraConfig", init_r=RANK, target_r=2, total_step=10)),
        Way("loha", "LoHa", other("LoHaConfig", r=RANK)),
        Way("vera", "VeRA", other("VeraConfig", r=RANK)),
        Way("ia3", "IA3", other("IA3Config", feedforward_modules=[])),
        Way("prefix", "prefix tuning", _prefix),
        Way("living", "generation, evaluation, copies and reloading between steps", between=_live),
        Way("experts", "LoRA on the parameters of experts as well", _experts),
        Way("eva", "EVA initialisation", lora(init_lora_weights="eva"), initialise=_explain_variance),
        Way("scaled", "float16 autocast over float32, the loss scaled by a GradScaler", autocast=torch.float16),
    )
}
"""By name."""
