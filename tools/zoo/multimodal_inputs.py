"""Random images and audio, in the layouts that models accept."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from fastlora.tools.zoo.tiny_config import IMAGE, LENGTH, PATCH

CHANNELS = 3
FRAMES = 2 * LENGTH
"""Length of spectrograms."""
SAMPLES = 3200
"""Length of waveforms."""
MEL_BINS = r"num_mel_bins|n_mels|mel_bins|feature_size|feature_projection_input_dim|input_feat_per_channel|input_dim"
"""Config field names that hold the number of mel bins."""
CROPS = 3
"""Images per example for models that split an image: two crops and the whole image."""

_IMAGE_ARGUMENTS = ("pixel_values", "image_pixel_values", "flattened_patches")
_AUDIO_ARGUMENTS = ("input_values", "input_features")
MULTIMODAL_ARGUMENTS = {*_IMAGE_ARGUMENTS, *_AUDIO_ARGUMENTS}
"""Arguments of a forward that take images or audio."""

Inputs = dict[str, torch.Tensor]


def config_values(config: Any, pattern: str) -> list[int]:
    """Return the integers in fields whose whole name matches. Values of nested configs come after those of the config
    itself, with the configs of vision and audio encoders first."""
    fields = config if isinstance(config, dict) else config.to_dict()
    found = [value for name, value in fields.items() if type(value) is int and re.fullmatch(pattern, str(name))]
    nested = {name: value for name, value in fields.items() if isinstance(value, dict)}
    for name in sorted(nested, key=lambda name: not re.search("vision|image|audio|encoder", str(name))):
        found += config_values(nested[name], pattern)
    return found


def image_inputs(config: Any, arguments: frozenset[str], rows: int, generator: torch.Generator) -> Iterator[Inputs]:
    """Yield one random image per row, with the arguments that describe its layout, in each layout that the names of
    the forward's arguments allow."""
    name = next((name for name in _IMAGE_ARGUMENTS if name in arguments), None)
    if name is None:
        return
    size = (config_values(config, "image_size") or [IMAGE])[0]
    patch = (config_values(config, "patch_size") or [PATCH])[0]
    for shape, description in _layouts(config, arguments, rows, size, patch):
        pixels = torch.randn(shape, generator=generator)
        if name == "flattened_patches":
            pixels[..., :2] = torch.tensor(_patch_positions(size // patch), dtype=pixels.dtype)
        inputs = {name: pixels}
        inputs |= {key: torch.tensor([value] * rows) for key, value in description.items() if key in arguments}
        if "high_res_pixel_values" in arguments:
            inputs["high_res_pixel_values"] = pixels
        if "qformer_input_ids" in arguments:
            inputs["qformer_input_ids"] = torch.ones(rows, 4, dtype=torch.int64)
        yield inputs


def _layouts(
    config: Any, arguments: frozenset[str], rows: int, size: int, patch: int
) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """Yield shapes of the pixel tensor, each with the arguments that describe one image."""
    side = size // patch
    patches, pixels = side * side, CHANNELS * patch * patch
    if "flattened_patches" in arguments:
        yield (rows, patches, 2 + pixels), {}
    elif "image_grid_thw" in arguments:
        merge = (config_values(config, "spatial_merge_size") or [1])[0]
        description = {"image_grid_thw": [1, side, side], "image_merge_sizes": merge}
        frames = (config_values(config, "temporal_patch_size|patch_temporal") or [1])[0]
        yield (rows * patches, frames * pixels), description
        yield (rows * patches, CHANNELS, patch, patch), description
    elif "image_grid_hw" in arguments:
        yield (rows * patches, pixels), {"image_grid_hw": [side, side]}
        yield (rows, CHANNELS, size, size), {"image_grid_hw": [side, side]}
    elif "target_sizes" in arguments:
        yield (1, CHANNELS, patch, rows * patches * patch), {"target_sizes": [side, side]}
    elif "spatial_shapes" in arguments:
        yield (rows, patches, pixels), {"spatial_shapes": [side, side], "pixel_attention_mask": [1] * patches}
    elif "image_position_ids" in arguments:
        pooled = (config_values(config, "pooling_kernel_size") or [1])[0]
        for width in (pixels, pixels * pooled * pooled):
            yield (rows, patches, width), {"image_position_ids": _patch_positions(side)}
    elif "aspect_ratio_ids" in arguments:
        tiles = (config_values(config, "max_num_tiles") or [1])[0]
        description = {"aspect_ratio_ids": [1], "aspect_ratio_mask": [[1] + [0] * (tiles - 1)]}
        yield (rows, 1, tiles, CHANNELS, size, size), description
    elif "pixel_attention_mask" in arguments and "tile_fine_mask" in arguments:
        yield (rows, 1, CHANNELS, size, size), {"pixel_attention_mask": [True]}
    else:
        sizes = {"image_sizes": [size, size]}
        yield (rows, CHANNELS, size, size), {}
        yield (rows, CHANNELS, size, size), sizes
        for images in (1, CROPS):
            mask = {"pixel_attention_mask": [[[1] * size] * size] * images}
            yield (rows, images, CHANNELS, size, size), sizes | mask
        yield (rows, patches, pixels), {}


def _patch_positions(side: int) -> list[list[int]]:
    return [[y, x] for y in range(side) for x in range(side)]


def audio_inputs(config: Any, arguments: frozenset[str], rows: int, generator: torch.Generator) -> Iterator[Inputs]:
    """Yield one random waveform per row, or spectrograms in both orders of mel bins and frames, with and without a
    mask."""
    name = next((name for name in _AUDIO_ARGUMENTS if name in arguments), None)
    if name is None:
        return
    if name == "input_values":
        yield {name: torch.randn(rows, SAMPLES, generator=generator)}
    bins = (config_values(config, MEL_BINS) or [80])[0]
    masks = {key for key in arguments if re.fullmatch("(input_features|feature_attention|padding)_mask", key)}
    if "input_ids" not in arguments:
        masks |= {"attention_mask"} & arguments
    for names in (masks, ()):
        for shape in ((rows, bins, FRAMES), (rows, FRAMES, bins)):
            mask = torch.ones(rows, FRAMES, dtype=torch.int64)
            yield {name: torch.randn(shape, generator=generator)} | dict.fromkeys(names, mask)
