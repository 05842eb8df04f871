"""Pictures and sounds of noise, in the layouts that models want them in."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from fastlora.tools.zoo.shrink import LENGTH, PATCH, PICTURE

CHANNELS = 3
FRAMES, SAMPLES = 2 * LENGTH, 3200
"""How long sounds are: as spectrograms, and as waves."""
BINS = r"num_mel_bins|n_mels|mel_bins|feature_size|feature_projection_input_dim|input_feat_per_channel|input_dim"
"""What a spectrogram's height is called."""
TILES = 3
"""Of a picture that is cut up: two, and one of the whole."""

_PICTURES = ("pixel_values", "image_pixel_values", "flattened_patches")
_SOUNDS = ("input_values", "input_features")
SENSES = {*_PICTURES, *_SOUNDS}
"""What arguments for pictures and sounds are called."""

Inputs = dict[str, torch.Tensor]
Noise = torch.Generator


def values(config: Any, pattern: str) -> list[int]:
    """The numbers in fields whose whole name matches, those of configurations inside after a configuration's own, and
    of them those that see and hear first."""
    fields = config if isinstance(config, dict) else config.to_dict()
    found = [value for name, value in fields.items() if type(value) is int and re.fullmatch(pattern, str(name))]
    inside = {name: value for name, value in fields.items() if isinstance(value, dict)}
    for name in sorted(inside, key=lambda name: not re.search("vision|image|audio|encoder", str(name))):
        found += values(inside[name], pattern)
    return found


def pictures(config: Any, taken: frozenset[str], rows: int, noise: Noise) -> Iterator[Inputs]:
    """One for each row, with what says how it is laid out, in each layout that the names allow."""
    name = next((name for name in _PICTURES if name in taken), None)
    if name is None:
        return
    size = (values(config, "image_size") or [PICTURE])[0]
    patch = (values(config, "patch_size") or [PATCH])[0]
    for shape, described in _layouts(config, taken, rows, size, patch):
        pixels = torch.randn(shape, generator=noise)
        if name == "flattened_patches":
            pixels[..., :2] = torch.tensor(_places(size // patch), dtype=pixels.dtype)
        more = {key: torch.tensor([value] * rows) for key, value in described.items() if key in taken}
        same = {"high_res_pixel_values": pixels} if "high_res_pixel_values" in taken else {}
        asked = {"qformer_input_ids": torch.ones(rows, 4, dtype=torch.int64)} if "qformer_input_ids" in taken else {}
        yield {name: pixels, **more, **same, **asked}


def _layouts(
    config: Any, taken: frozenset[str], rows: int, size: int, patch: int
) -> Iterator[tuple[tuple[int, ...], dict[str, Any]]]:
    """Shapes of all pictures, and what else is said of each."""
    side = size // patch
    patches, pixels = side * side, CHANNELS * patch * patch
    if "flattened_patches" in taken:
        yield (rows, patches, 2 + pixels), {}
    elif "image_grid_thw" in taken:
        merge = (values(config, "spatial_merge_size") or [1])[0]
        described = {"image_grid_thw": [1, side, side], "image_merge_sizes": merge}
        times = (values(config, "temporal_patch_size|patch_temporal") or [1])[0]
        yield (rows * patches, times * pixels), described
        yield (rows * patches, CHANNELS, patch, patch), described
    elif "image_grid_hw" in taken:
        yield (rows * patches, pixels), {"image_grid_hw": [side, side]}
        yield (rows, CHANNELS, size, size), {"image_grid_hw": [side, side]}
    elif "target_sizes" in taken:
        yield (1, CHANNELS, patch, rows * patches * patch), {"target_sizes": [side, side]}
    elif "spatial_shapes" in taken:
        shapes = {"spatial_shapes": [side, side], "pixel_attention_mask": [1] * patches}
        yield (rows, patches, pixels), shapes
    elif "image_position_ids" in taken:
        pooled = (values(config, "pooling_kernel_size") or [1])[0]
        for width in (pixels, pixels * pooled * pooled):
            yield (rows, patches, width), {"image_position_ids": _places(side)}
    elif "aspect_ratio_ids" in taken:
        tiles = (values(config, "max_num_tiles") or [1])[0]
        described = {"aspect_ratio_ids": [1], "aspect_ratio_mask": [[1] + [0] * (tiles - 1)]}
        yield (rows, 1, tiles, CHANNELS, size, size), described
    elif "pixel_attention_mask" in taken and "tile_fine_mask" in taken:
        yield (rows, 1, CHANNELS, size, size), {"pixel_attention_mask": [True]}
    else:
        sizes = {"image_sizes": [size, size]}
        yield (rows, CHANNELS, size, size), {}
        yield (rows, CHANNELS, size, size), sizes
        for several in (1, TILES):
            seen = {"pixel_attention_mask": [[[1] * size] * size] * several}
            yield (rows, several, CHANNELS, size, size), sizes | seen
        yield (rows, patches, pixels), {}


def _places(side: int) -> list[list[int]]:
    """Of patches, in two dimensions."""
    return [[y, x] for y in range(side) for x in range(side)]


def sounds(config: Any, taken: frozenset[str], rows: int, noise: Noise) -> Iterator[Inputs]:
    """One for each row: a wave, or a spectrogram whichever way it lies."""
    name = next((name for name in _SOUNDS if name in taken), None)
    if name == "input_values":
        yield {name: torch.randn(rows, SAMPLES, generator=noise)}
    if name is None:
        return
    bins = (values(config, BINS) or [80])[0]
    masks = {key for key in taken if re.fullmatch("(input_features|feature_attention|padding)_mask", key)}
    if "input_ids" not in taken:
        masks |= {"attention_mask"} & taken
    for masked in (masks, ()):
        for shape in ((rows, bins, FRAMES), (rows, FRAMES, bins)):
            heard = torch.ones(rows, FRAMES, dtype=torch.int64)
            yield {name: torch.randn(shape, generator=noise)} | dict.fromkeys(masked, heard)
