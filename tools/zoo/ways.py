"""Ways to train: settings of PEFT and of the training loop.

The plain way is LoRA on all linear layers except the output head, in evaluation mode and float32. Each other way
differs from it in one setting.
"""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlora.tools.zoo.quantize import quantize_layers

RANK = 4
PACKED_LENGTH = 8
"""Tokens of each sequence in a packed row."""

LINEAR = re.compile(r"(?!.*Grouped).*(Linear|Conv1D)")
"""Class names of the linear layers that are adapted. Other subclasses of nn.Linear are routers, which return several
tensors, and grouped layers, whose weight PEFT takes for that of a single layer."""
MAMBA_LAYERS = ("out_proj", "conv1d")
"""Layers of Mamba models that PEFT refuses to adapt, because Mamba's kernels use their weights directly."""
MAMBA_TYPES = ("falcon_h1", "nemotron_h")
"""Model types that PEFT treats as Mamba models although no class name says so."""

Batch = dict[str, torch.Tensor]
Adapt = Callable[[nn.Module, list[str]], nn.Module]


def linear_layers(base: Any) -> list[str]:
    """Return the names of the linear layers that are adapted: all that PEFT can adapt, except the output head."""
    import transformers

    head = base.get_output_embeddings()
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    names = [
        name
        for name, module in base.named_modules()
        if isinstance(module, linear) and LINEAR.fullmatch(type(module).__name__) and module is not head
    ]
    classes = {type(module).__name__.lower() for module in base.modules()}
    if base.config.model_type in MAMBA_TYPES or any("mamba" in name for name in classes):
        names = [name for name in names if not name.endswith(MAMBA_LAYERS)]
    return names


def lora(**options: Any) -> Adapt:
    """Return a function that adds LoRA to the named layers; `options` go to `LoraConfig`."""

    def adapt(base: nn.Module, names: list[str]) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(
            base, LoraConfig(**{"r": RANK, "lora_alpha": 2 * RANK, "target_modules": names, **options})
        )

    return adapt


def tuner(config: str, **options: Any) -> Adapt:
    """Return a function that adds another tuner of PEFT, by the name of its config class."""

    def adapt(base: nn.Module, names: list[str]) -> nn.Module:
        import peft

        return peft.get_peft_model(base, getattr(peft, config)(target_modules=names, **options))

    return adapt


def _mixed_ranks(base: nn.Module, names: list[str]) -> nn.Module:
    ranks = {name: 2 + i % 5 for i, name in enumerate(names)}
    alphas = {name: 3 + i % 4 for i, name in enumerate(names)}
    return lora(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=True)(base, names)


def _two_adapters(base: nn.Module, names: list[str]) -> nn.Module:
    from peft import LoraConfig

    model: Any = lora()(base, names)
    model.add_adapter("second", LoraConfig(r=2, lora_alpha=3, target_modules=names))
    model.base_model.set_adapter(["default", "second"])
    return model


def _second_adapter(base: nn.Module, names: list[str]) -> nn.Module:
    model: Any = _two_adapters(base, names)
    model.set_adapter("second")
    return model


def _names_of(base: nn.Module, *modules: nn.Module | None) -> list[str]:
    return [name for name, module in base.named_modules() if module in modules]


def _embeddings_too(base: Any, names: list[str]) -> nn.Module:
    return lora()(base, [*names, *_names_of(base, base.get_input_embeddings(), base.get_output_embeddings())])


def _head_too(base: Any, names: list[str]) -> nn.Module:
    return lora(modules_to_save=_names_of(base, base.get_output_embeddings()))(base, names)


def _first_layer(base: nn.Module, names: list[str]) -> nn.Module:
    return lora()(base, [name for name in names if ".0." in name])


def _every_other(base: nn.Module, names: list[str]) -> nn.Module:
    """Adapt every other layer, so that groups such as q, k and v are incomplete."""
    return lora()(base, names[::2])


def _experts(base: nn.Module, names: list[str]) -> nn.Module:
    """Adapt the 3-D parameters that hold the weights of all experts as well, if there are any."""
    stacked = [name for name, p in base.named_parameters() if p.dim() == 3 and ".experts." in name]
    return lora(target_parameters=stacked or None)(base, names)


def _full(base: nn.Module, names: list[str]) -> nn.Module:
    return base.requires_grad_(True)


def _quantized(base: nn.Module, names: list[str]) -> nn.Module:
    return lora()(quantize_layers(base, names), names)


def _initialize_eva(model: nn.Module, inputs: Batch) -> None:
    """Initialize with EVA: each A from the principal components of its layer's inputs, and ranks by how much of their
    variance these explain."""
    from peft import initialize_lora_eva_weights

    def flatten(layer_input: Any, inputs: Any, name: str) -> torch.Tensor:
        x: torch.Tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
        return x.flatten(end_dim=-2)

    initialize_lora_eva_weights(
        model, [inputs], prepare_model_inputs_fn=None, prepare_layer_inputs_fn=flatten, show_progress_bar=False
    )


def _prefix(base: nn.Module, names: list[str]) -> nn.Module:
    from peft import PrefixTuningConfig, get_peft_model

    return get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


def _unchanged(inputs: Batch) -> Batch:
    return inputs


def _padded(left: bool) -> Callable[[Batch], Batch]:
    """Return a function that turns five tokens of the first row into padding."""

    def pad(inputs: Batch) -> Batch:
        padded = {name: value.clone() for name, value in inputs.items()}
        tokens = slice(None, 5) if left else slice(-5, None)
        for name, value in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
            padded[name][0, tokens] = value
        return padded

    return pad


def _positions(inputs: Batch) -> Batch:
    """Return a batch with several sequences per row, separated by position_ids alone. transformers detects this only
    without a KV cache; with one, each row is one sequence with repeated positions."""
    rows, length = inputs["input_ids"].shape
    positions = (torch.arange(length) % PACKED_LENGTH).expand(rows, length)
    return {"input_ids": inputs["input_ids"], "labels": inputs["labels"], "position_ids": positions}


def _packed(inputs: Batch) -> Batch:
    return {**_positions(inputs), "use_cache": False}  # type: ignore[dict-item]


def _use_between_steps(model: Any, inputs: Batch) -> None:
    """Do what users do between two steps: train, evaluate, generate, copy, save and load."""
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
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    model.load_state_dict(torch.load(file))


@dataclass(frozen=True)
class Way:
    """How a tiny model is trained.

    Attributes:
        description: how it differs from the plain way, for the page.
        adapt: makes the trained model of the base model and the names of its linear layers.
        inputs: changes the batch.
        initialize: initializes adapters from data; called with the adapted model and its batch.
        keeps_initialization: whether B stays as PEFT initialized it; otherwise it is random, not zero.
        training: whether the model is in training mode, with dropout.
        dtype: dtype of the base model; adapters are float32.
        autocast: the dtype of autocast, or None without it.
        use_reentrant: the kind of gradient checkpointing, or None without it.
        before_step: called with the compiled model and its batch before the step that is compared.
    """

    name: str
    description: str
    adapt: Adapt = lora()  # noqa: RUF009  (a function)
    inputs: Callable[[Batch], Batch] = _unchanged
    initialize: Callable[[nn.Module, Batch], None] | None = None
    keeps_initialization: bool = False
    training: bool = False
    dtype: torch.dtype = torch.float32
    autocast: torch.dtype | None = None
    use_reentrant: bool | None = None
    before_step: Callable[[nn.Module, Batch], None] | None = None

    @property
    def is_low_precision(self) -> bool:
        """Whether errors are compared with those of eager, which are large in this precision."""
        return self.dtype is not torch.float32 or self.autocast is not None


PLAIN = Way("plain", "LoRA on all linear layers except the output head, evaluation mode, float32")
WAYS = {
    way.name: way
    for way in (
        PLAIN,
        Way("dropout", "dropout in the model and before the adapters", lora(lora_dropout=0.2), training=True),
        Way("checkpointing", "gradient checkpointing, use_reentrant=False", training=True, use_reentrant=False),
        Way("reentrant", "gradient checkpointing, use_reentrant=True", training=True, use_reentrant=True),
        Way("left-padding", "a sequence padded on the left", inputs=_padded(left=True)),
        Way("right-padding", "a sequence padded on the right", inputs=_padded(left=False)),
        Way("packed", "several sequences per row, separated by position_ids", inputs=_packed),
        Way("positions", "position_ids with a KV cache, the default of transformers", inputs=_positions),
        Way("bfloat16", "a bfloat16 base with float32 adapters", dtype=torch.bfloat16),
        Way("autocast", "bfloat16 autocast over float32", autocast=torch.bfloat16),
        Way("both", "bfloat16 autocast over a bfloat16 base", dtype=torch.bfloat16, autocast=torch.bfloat16),
        Way("nf4", "base layers in NF4 with double quantization; dropout in the model", _quantized, training=True),
        Way("full", "full fine-tuning, no adapters", _full),
        Way("mixed-ranks", "rank_pattern, alpha_pattern and rsLoRA", _mixed_ranks),
        Way("lora-bias", "a bias in B (lora_bias=True)", lora(lora_bias=True)),
        Way("biases", "biases of the base layers are trained as well", lora(bias="all")),
        Way("dora", "DoRA", lora(use_dora=True)),
        Way("pissa", "PiSSA initialization", lora(init_lora_weights="pissa"), keeps_initialization=True),
        Way("olora", "OLoRA initialization", lora(init_lora_weights="olora"), keeps_initialization=True),
        Way("two-adapters", "two adapters are active", _two_adapters),
        Way("switched", "the second of two adapters is active", _second_adapter),
        Way("everything", "LoRA on embeddings and the output head as well", _embeddings_too),
        Way("head-too", "the output head is trained, through modules_to_save", _head_too),
        Way("first-layer", "LoRA in the first layer only", _first_layer),
        Way("every-other", "LoRA on every other linear layer", _every_other),
        Way("adalora", "AdaLoRA", tuner("AdaLoraConfig", init_r=RANK, target_r=2, total_step=10)),
        Way("loha", "LoHa", tuner("LoHaConfig", r=RANK)),
        Way("vera", "VeRA", tuner("VeraConfig", r=RANK)),
        Way("ia3", "IA3", tuner("IA3Config", feedforward_modules=[])),
        Way("prefix", "prefix tuning", _prefix),
        Way("living", "generation, evaluation, copying and reloading between steps", before_step=_use_between_steps),
        Way("experts", "LoRA on the weights of experts as well", _experts),
        Way("eva", "EVA initialization", lora(init_lora_weights="eva"), initialize=_initialize_eva),
        Way("scaled", "float16 autocast over float32, with a GradScaler", autocast=torch.float16),
    )
}
