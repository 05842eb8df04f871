"""Batches of `fastlora zoo`: image and audio layouts, placeholder tokens and labels."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastlora.tools.zoo import compare
from fastlora.tools.zoo.architectures import Architecture
from fastlora.tools.zoo.batches import CLASSES, CTC_LENGTH, IGNORED, LENGTH, PREFIX, ROWS, make_batch
from fastlora.tools.zoo.multimodal_inputs import audio_inputs, config_values, image_inputs

LLAVA = Architecture("llava", "AutoModelForImageTextToText")
TOWERS = {
    LLAVA: r".*vision_tower.*layers\.0.*lora_",
    Architecture("qwen2_vl", "AutoModelForImageTextToText"): r".*visual\.blocks.*lora_",
    Architecture("mllama", "AutoModelForImageTextToText"): r".*vision_model.*lora_",
    Architecture("qwen2_audio", "AutoModelForMultimodalLM"): r".*audio_tower.*lora_",
}


@pytest.mark.parametrize("architecture", TOWERS, ids=str)
def test_tower_adapters_train_through_the_language_model(architecture: Architecture) -> None:
    model = compare.build(architecture)
    step = compare._step(model, make_batch(model, architecture))
    tower = [name for name in step.gradients if re.match(TOWERS[architecture], name)]
    assert len(tower) >= 8
    assert all(step.gradients[name].any() for name in tower)


def test_the_image_changes_the_loss() -> None:
    model = compare.build(LLAVA)
    inputs = make_batch(model, LLAVA)
    other = inputs | {"pixel_values": -inputs["pixel_values"]}
    assert compare._step(model, inputs).loss != compare._step(model, other).loss


def test_there_is_one_placeholder_token_per_image_feature_without_a_label() -> None:
    model = compare.build(LLAVA)
    inputs, token = make_batch(model, LLAVA), model.config.image_token_id  # type: ignore[union-attr]
    features = model.config.vision_config.image_size**2 // model.config.vision_config.patch_size**2  # type: ignore[union-attr]
    assert inputs["input_ids"].shape == (ROWS, LENGTH + features)
    assert (inputs["input_ids"] == token).sum(1).tolist() == [features] * ROWS
    assert torch.equal(inputs["labels"] == IGNORED, inputs["input_ids"] == token)
    assert (inputs["input_ids"][:, PREFIX] == token).all()


def test_batches_depend_on_the_seed_alone() -> None:
    model = compare.build(LLAVA)
    first, again, other = (make_batch(model, LLAVA, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pixel_values"], other["pixel_values"])
    assert not torch.equal(first["input_ids"], other["input_ids"])


@pytest.mark.parametrize(("architecture", "shape"), [
    (Architecture("vit", "AutoModelForImageClassification"), (ROWS,)),
    (Architecture("bert", "AutoModelForSequenceClassification"), (ROWS,)),
    (Architecture("wav2vec2", "AutoModelForCTC"), (ROWS, CTC_LENGTH)),
    (Architecture("whisper", "AutoModelForSpeechSeq2Seq"), (ROWS, LENGTH)),
], ids=str)  # fmt: skip
def test_labels_have_the_shape_that_the_auto_class_needs(architecture: Architecture, shape: tuple[int, ...]) -> None:
    inputs = make_batch(compare.build(architecture), architecture)
    assert inputs["labels"].shape == shape
    assert not architecture.is_classifier or inputs["labels"].max() < CLASSES


@pytest.mark.parametrize(("names", "layouts"), [
    ({"pixel_values", "image_grid_thw"}, [(32, 384), (32, 3, 8, 8)]),
    ({"pixel_values", "spatial_shapes"}, [(2, 16, 192)]),
    ({"pixel_values", "target_sizes"}, [(1, 3, 8, 256)]),
    ({"pixel_values", "aspect_ratio_ids"}, [(2, 1, 4, 3, 32, 32)]),
    ({"flattened_patches"}, [(2, 16, 194)]),
    ({"pixel_values"}, [(2, 3, 32, 32)] * 2 + [(2, 1, 3, 32, 32), (2, 3, 3, 32, 32), (2, 16, 192)]),
])  # fmt: skip
def test_image_layouts_follow_from_the_argument_names(names: set[str], layouts: list[tuple[int, ...]]) -> None:
    config = {"image_size": 32, "patch_size": 8, "temporal_patch_size": 2, "max_num_tiles": 4}
    found = list(image_inputs(config, frozenset(names), 2, torch.Generator()))
    assert [tuple(next(iter(inputs.values())).shape) for inputs in found] == layouts
    assert all(set(inputs) <= names for inputs in found)


def test_audio_is_a_waveform_or_a_spectrogram() -> None:
    waveforms = list(audio_inputs({}, frozenset({"input_values"}), 2, torch.Generator()))
    assert waveforms[0]["input_values"].dim() == 2
    spectrograms = list(audio_inputs({"num_mel_bins": 40}, frozenset({"input_features"}), 2, torch.Generator()))
    assert [inputs["input_features"].shape.index(40) for inputs in spectrograms[:2]] == [1, 2]
    assert not list(audio_inputs({}, frozenset({"input_ids"}), 2, torch.Generator()))


def test_fields_of_vision_configs_come_before_those_of_text_configs() -> None:
    config = {"patch": 1, "text_config": {"patch": 2}, "vision_config": {"patch": 3}, "on": True}
    assert config_values(config, "patch|on") == [1, 3, 2]


class RejectsEveryLayout(nn.Module):
    config = SimpleNamespace(to_dict=dict)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> None:
        raise RuntimeError(f"not with {pixel_values.dim()} dimensions")


def test_if_no_layout_fits_the_error_for_the_first_is_raised() -> None:
    with pytest.raises(RuntimeError, match="not with 4 dimensions"):
        make_batch(RejectsEveryLayout(), Architecture("custom", "AutoModelForImageClassification"))
