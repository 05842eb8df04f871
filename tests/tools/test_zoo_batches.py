"""What models see and hear reaches what is trained of them, and nothing else stands for it."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastlora.tools.zoo import examine
from fastlora.tools.zoo.batches import BEFORE, CLASSES, IGNORED, LENGTH, ROWS, TRANSCRIPT, batch
from fastlora.tools.zoo.kinds import Kind
from fastlora.tools.zoo.senses import pictures, sounds, values

LLAVA = Kind("llava", "AutoModelForImageTextToText")
TOWERS = {
    LLAVA: r".*vision_tower.*layers\.0.*lora_",
    Kind("qwen2_vl", "AutoModelForImageTextToText"): r".*visual\.blocks.*lora_",
    Kind("mllama", "AutoModelForImageTextToText"): r".*vision_model.*lora_",
    Kind("qwen2_audio", "AutoModelForMultimodalLM"): r".*audio_tower.*lora_",
}


@pytest.mark.parametrize("kind", TOWERS, ids=str)
def test_tower_adapters_train_through_the_language_model(kind: Kind) -> None:
    model = examine.build(kind)
    step = examine._step(model, batch(model, kind))
    tower = [name for name in step.gradients if re.match(TOWERS[kind], name)]
    assert len(tower) >= 8
    assert all(step.gradients[name].any() for name in tower)


def test_what_is_seen_changes_the_loss() -> None:
    model = examine.build(LLAVA)
    inputs = batch(model, LLAVA)
    other = inputs | {"pixel_values": -inputs["pixel_values"]}
    assert examine._step(model, inputs).loss != examine._step(model, other).loss


def test_image_tokens_match_the_encoder_and_have_no_labels() -> None:
    model = examine.build(LLAVA)
    inputs, token = batch(model, LLAVA), model.config.image_token_id  # type: ignore[union-attr]
    many = model.config.vision_config.image_size**2 // model.config.vision_config.patch_size**2  # type: ignore[union-attr]
    assert inputs["input_ids"].shape == (ROWS, LENGTH + many)
    assert (inputs["input_ids"] == token).sum(1).tolist() == [many] * ROWS
    assert torch.equal(inputs["labels"] == IGNORED, inputs["input_ids"] == token)
    assert (inputs["input_ids"][:, BEFORE] == token).all()


def test_batches_differ_by_their_seeds_alone() -> None:
    model = examine.build(LLAVA)
    first, again, other = (batch(model, LLAVA, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pixel_values"], other["pixel_values"])
    assert not torch.equal(first["input_ids"], other["input_ids"])


@pytest.mark.parametrize(("kind", "shape"), [
    (Kind("vit", "AutoModelForImageClassification"), (ROWS,)),
    (Kind("bert", "AutoModelForSequenceClassification"), (ROWS,)),
    (Kind("wav2vec2", "AutoModelForCTC"), (ROWS, TRANSCRIPT)),
    (Kind("whisper", "AutoModelForSpeechSeq2Seq"), (ROWS, LENGTH)),
], ids=str)  # fmt: skip
def test_labels_are_what_the_class_predicts(kind: Kind, shape: tuple[int, ...]) -> None:
    inputs = batch(examine.build(kind), kind)
    assert inputs["labels"].shape == shape
    assert not kind.classifies or inputs["labels"].max() < CLASSES


@pytest.mark.parametrize(("names", "layouts"), [
    ({"pixel_values", "image_grid_thw"}, [(32, 384), (32, 3, 8, 8)]),
    ({"pixel_values", "spatial_shapes"}, [(2, 16, 192)]),
    ({"pixel_values", "target_sizes"}, [(1, 3, 8, 256)]),
    ({"pixel_values", "aspect_ratio_ids"}, [(2, 1, 4, 3, 32, 32)]),
    ({"flattened_patches"}, [(2, 16, 194)]),
    ({"pixel_values"}, [(2, 3, 32, 32)] * 2 + [(2, 1, 3, 32, 32), (2, 3, 3, 32, 32), (2, 16, 192)]),
])  # fmt: skip
def test_pictures_are_laid_out_as_the_names_say(names: set[str], layouts: list[tuple[int, ...]]) -> None:
    config = {"image_size": 32, "patch_size": 8, "temporal_patch_size": 2, "max_num_tiles": 4}
    made = list(pictures(config, frozenset(names), 2, torch.Generator()))
    assert [tuple(next(iter(inputs.values())).shape) for inputs in made] == layouts
    assert all(set(inputs) <= names for inputs in made)


def test_sounds_are_waves_or_spectrograms() -> None:
    waves = list(sounds({}, frozenset({"input_values"}), 2, torch.Generator()))
    assert waves[0]["input_values"].dim() == 2
    high = list(sounds({"num_mel_bins": 40}, frozenset({"input_features"}), 2, torch.Generator()))
    assert [inputs["input_features"].shape.index(40) for inputs in high[:2]] == [1, 2]
    assert not list(sounds({}, frozenset({"input_ids"}), 2, torch.Generator()))


def test_fields_of_what_sees_come_before_those_of_what_reads() -> None:
    config = {"patch": 1, "text_config": {"patch": 2}, "vision_config": {"patch": 3}, "on": True}
    assert values(config, "patch|on") == [1, 3, 2]


class Blind(nn.Module):
    config = SimpleNamespace(to_dict=dict)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> None:
        raise RuntimeError(f"not with {pixel_values.dim()} dimensions")


def test_what_no_layout_suits_says_so_of_the_first() -> None:
    with pytest.raises(RuntimeError, match="not with 4 dimensions"):
        batch(Blind(), Kind("blind", "AutoModelForImageClassification"))
