"""A batch for a tiny model: tokens that predict themselves, and pictures and sounds of noise where it sees and hears.

What a model takes is read off the names of its forward's arguments and of its configuration's fields. Where they do
not tell which of several layouts of a picture or a sound it wants, it is the first that a forward takes. How many
tokens of a row stand for it, its own encoder is asked.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastlora.tools.zoo.kinds import Kind
from fastlora.tools.zoo.senses import SENSES, Inputs, pictures, sounds, values
from fastlora.tools.zoo.shrink import VOCABULARY

ROWS, LENGTH, BEFORE = 2, 16, 4
"""Of a batch, and how many tokens of a row come before what stands for a picture or a sound."""
CLASSES = 2
TRANSCRIPT = 4
"""Tokens of a label that a connectionist loss aligns with a sound, which must be shorter than that."""
IGNORED = -100
TYPES = ("mm_token_type_ids", "token_type_ids", "image_embeds_position_mask")
"""Arguments that say which tokens stand for something else."""


def batch(model: nn.Module, kind: Kind, seed: int = 0) -> Inputs:
    """Two rows for the model, or for the one that PEFT has wrapped.

    Raises:
        Exception: what the model raises for the first layout, if it takes none.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    taken = frozenset(inspect.signature(base.forward).parameters)
    problem: Exception | None = None
    for noise, encoder, token in _senses(base, kind, taken, seed):
        inputs = typed(base, noise)
        try:
            standing = _standing(base, taken, inputs, encoder, token)
            made = inputs | _words(base, kind, taken, standing, seed)
            if inputs:
                with torch.no_grad():
                    base(**made)
        except Exception as raised:  # libraries raise anything for shapes that they do not take
            problem = problem or raised
        else:
            return made
    raise problem or ValueError("nothing is known of what it sees or hears")


def typed(model: nn.Module, inputs: Inputs) -> Inputs:
    """With noise in the dtype of the model, that of adapters aside."""
    dtype = next(parameter.dtype for name, parameter in model.named_parameters() if "lora_" not in name)
    noise = {name for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()}
    return {name: value.to(dtype) if name in noise else value for name, value in inputs.items()}


def _senses(base: Any, kind: Kind, taken: frozenset[str], seed: int) -> Iterator[tuple[Inputs, str, str]]:
    """What it may be given to see, or else to hear, with the names of the encoder's method and of the token."""
    if kind.reads_only or not taken & SENSES:
        yield {}, "", ""
        return
    generator = torch.Generator().manual_seed(seed)
    for inputs in pictures(base.config, taken, ROWS, generator):
        yield inputs, "get_image_features", "image_token_(id|index)"
    for inputs in sounds(base.config, taken, ROWS, generator):
        yield inputs, "get_audio_features", "audio_token_(id|index)"


def _standing(base: Any, taken: frozenset[str], inputs: Inputs, encoder: str, token: str) -> torch.Tensor:
    """The tokens of a row that stand for what an encoder makes of the inputs, or at most one if there is no encoder."""
    numbers = values(base.config, token)
    encode = getattr(base, encoder, None) or getattr(getattr(base, "model", None), encoder, None)
    if "image_embeds_position_mask" in taken:
        return torch.zeros(values(base.config, "latent_query_num")[0], dtype=torch.int64)
    if encode is None or not numbers:
        return torch.tensor(numbers[:1], dtype=torch.int64)
    names = inspect.signature(encode).parameters
    with torch.no_grad():
        found = encode(**{name: value for name, value in inputs.items() if name in names or "kwargs" in names})
    features = getattr(found, "pooler_output", found)
    features = found.last_hidden_state if features is None else features
    parts = features if isinstance(features, list | tuple) else [features]
    return torch.full((sum(part.shape[:-1].numel() for part in parts) // ROWS,), numbers[0])


def _words(base: Any, kind: Kind, taken: frozenset[str], standing: torch.Tensor, seed: int) -> Inputs:
    """Tokens, if it takes any, and labels."""
    generator = torch.Generator().manual_seed(seed)
    special = values(base.config, r".*token_(id|index)")
    ordinary = torch.tensor([i for i in range(3, VOCABULARY - 1) if i not in special])
    words = ordinary[torch.randint(len(ordinary), (ROWS, LENGTH), generator=generator)]
    ids = torch.cat([words[:, :BEFORE], standing.expand(ROWS, -1), words[:, BEFORE:]], dim=1)
    seen = torch.zeros_like(ids)
    seen[:, BEFORE : BEFORE + len(standing)] = 1
    labels = ids.masked_fill(seen.bool(), IGNORED)
    if kind.classifies:
        labels = torch.randint(CLASSES, (ROWS,), generator=generator)
    elif "input_ids" not in taken and "decoder_input_ids" not in taken:
        labels = words[:, :TRANSCRIPT] % min(values(base.config, "vocab_size"))
    if "input_ids" not in taken:
        return {"labels": labels}
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    types = [name for name in TYPES if name in taken and not kind.reads_only]
    return made | dict.fromkeys(types, seen) | _crossed(base.config, taken, ids.shape[1])


def _crossed(config: Any, taken: frozenset[str], length: int) -> Inputs:
    """Which pictures a token looks at, of models that do so in layers of their own: all; and where on a page it is."""
    one, tiles = (ROWS, length, 1), (values(config, "max_num_tiles") or [1])[0]
    masks = {"image_attention_mask": one, "cross_attention_mask": (*one, tiles), "bbox": (ROWS, length, 4)}
    return {name: torch.ones(shape, dtype=torch.int64) for name, shape in masks.items() if name in taken}
