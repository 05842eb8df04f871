"""Random batches for a tiny model: labels are the input tokens, images and audio are noise.

The arguments are derived from the signature of the model's forward and from its config. If they allow several layouts
of images or audio, the first that the forward accepts is taken. The number of placeholder tokens for an image or audio
clip is the number of features that the model's own encoder returns.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastlora.tools.zoo.architectures import Architecture
from fastlora.tools.zoo.multimodal_inputs import (
    MULTIMODAL_ARGUMENTS,
    Inputs,
    audio_inputs,
    config_values,
    image_inputs,
)
from fastlora.tools.zoo.tiny_config import VOCAB

ROWS, LENGTH = 2, 16
PREFIX = 4
"""Text tokens of a row in front of the placeholder tokens."""
CLASSES = 2
CTC_LENGTH = 4
"""Tokens of a CTC label, which must be shorter than the audio."""
IGNORED = -100
TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids", "image_embeds_position_mask")
"""Arguments that mark the placeholder tokens with 1."""


def make_batch(model: nn.Module, architecture: Architecture, seed: int = 0) -> Inputs:
    """Return a batch of two rows for a model, which PEFT may have wrapped.

    Raises:
        Exception: anything that the model raises for the first layout, if it accepts none.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    arguments = frozenset(inspect.signature(base.forward).parameters)
    first_problem: Exception | None = None
    for noise, encoder, token in _multimodal_inputs(base, architecture, arguments, seed):
        inputs = cast_floats(base, noise)
        try:
            placeholders = _placeholders(base, arguments, inputs, encoder, token)
            batch = inputs | _text_inputs(base, architecture, arguments, placeholders, seed)
            if inputs:
                with torch.no_grad():
                    base(**batch)
        except Exception as problem:  # libraries raise anything for layouts that they do not accept
            first_problem = first_problem or problem
        else:
            return batch
    raise first_problem or ValueError(f"{architecture}: no known layout of images or audio fits its forward")


def cast_floats(model: nn.Module, inputs: Inputs) -> Inputs:
    """Return the inputs with floating-point tensors cast to the dtype of the base model."""
    dtype = next(parameter.dtype for name, parameter in model.named_parameters() if "lora_" not in name)
    floats = {name for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()}
    return {name: value.to(dtype) if name in floats else value for name, value in inputs.items()}


def _multimodal_inputs(
    base: Any, architecture: Architecture, arguments: frozenset[str], seed: int
) -> Iterator[tuple[Inputs, str, str]]:
    """Yield layouts of images, then of audio, each with the name of the encoder's method and a pattern of the config
    field with the placeholder token; nothing but empty inputs for models that take text alone."""
    if architecture.is_text_only or not arguments & MULTIMODAL_ARGUMENTS:
        yield {}, "", ""
        return
    generator = torch.Generator().manual_seed(seed)
    for inputs in image_inputs(base.config, arguments, ROWS, generator):
        yield inputs, "get_image_features", "image_token_(id|index)"
    for inputs in audio_inputs(base.config, arguments, ROWS, generator):
        yield inputs, "get_audio_features", "audio_token_(id|index)"


def _placeholders(base: Any, arguments: frozenset[str], inputs: Inputs, encoder: str, token: str) -> torch.Tensor:
    """Return the placeholder tokens of a row: one per feature that the encoder returns; without an encoder, one if the
    config has such a token, or none."""
    token_ids = config_values(base.config, token)
    encode = getattr(base, encoder, None) or getattr(getattr(base, "model", None), encoder, None)
    if "image_embeds_position_mask" in arguments:
        return torch.zeros(config_values(base.config, "latent_query_num")[0], dtype=torch.int64)
    if encode is None or not token_ids:
        return torch.tensor(token_ids[:1], dtype=torch.int64)
    names = inspect.signature(encode).parameters
    with torch.no_grad():
        outputs = encode(**{name: value for name, value in inputs.items() if name in names or "kwargs" in names})
    features = getattr(outputs, "pooler_output", outputs)
    features = outputs.last_hidden_state if features is None else features
    parts = features if isinstance(features, list | tuple) else [features]
    return torch.full((sum(part.shape[:-1].numel() for part in parts) // ROWS,), token_ids[0])


def _text_inputs(
    base: Any, architecture: Architecture, arguments: frozenset[str], placeholders: torch.Tensor, seed: int
) -> Inputs:
    """Return the labels and, if the forward takes them, tokens with a mask."""
    generator = torch.Generator().manual_seed(seed)
    special = config_values(base.config, r".*token_(id|index)")
    ordinary = torch.tensor([i for i in range(3, VOCAB - 1) if i not in special])
    text = ordinary[torch.randint(len(ordinary), (ROWS, LENGTH), generator=generator)]
    ids = torch.cat([text[:, :PREFIX], placeholders.expand(ROWS, -1), text[:, PREFIX:]], dim=1)
    is_placeholder = torch.zeros_like(ids)
    is_placeholder[:, PREFIX : PREFIX + len(placeholders)] = 1
    labels = ids.masked_fill(is_placeholder.bool(), IGNORED)
    if architecture.is_classifier:
        labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    elif "input_ids" not in arguments and "decoder_input_ids" not in arguments:
        labels = text[:, :CTC_LENGTH] % min(config_values(base.config, "vocab_size"))
    if "input_ids" not in arguments:
        return {"labels": labels}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    types = [name for name in TOKEN_TYPES if name in arguments and not architecture.is_text_only]
    return inputs | dict.fromkeys(types, is_placeholder) | _masks_of_ones(base.config, arguments, ids.shape[1])


def _masks_of_ones(config: Any, arguments: frozenset[str], length: int) -> Inputs:
    """Return the masks of cross-attention layers, so that each token attends to all images, and bounding boxes."""
    tiles = (config_values(config, "max_num_tiles") or [1])[0]
    shapes = {
        "image_attention_mask": (ROWS, length, 1),
        "cross_attention_mask": (ROWS, length, 1, tiles),
        "bbox": (ROWS, length, 4),
    }
    return {name: torch.ones(shape, dtype=torch.int64) for name, shape in shapes.items() if name in arguments}
