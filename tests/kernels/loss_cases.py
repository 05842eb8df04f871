"""Arguments of `linear_cross_entropy`, and a patch for its chunk size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import Arguments, f32, f64

from fastlora.kernels.formulas import linear_cross_entropy as module

PLAIN = {
    "scale": 1.0,
    "softcap": 0.0,
    "ignore_index": -100,
    "reduction": "mean",
    "label_smoothing": 0.0,
    "z_loss": 0.0,
}


def arguments(
    dtype: torch.dtype,
    tokens: int,
    hidden: int,
    vocabulary: int,
    bias: bool = False,
    rank: int = 0,
    ignores: bool = True,
    **others: Any,
) -> Arguments:
    """Return arguments whose logits are of the size of a trained model's; every third label is ignored."""
    labels = torch.randint(0, vocabulary, (tokens,))
    if ignores:
        labels[::3] = others.get("ignore_index", -100)
    given_ = {
        "x": torch.randn(tokens, hidden, dtype=f64).to(dtype),
        "weight": (3 * torch.randn(vocabulary, hidden, dtype=f64) * hidden**-0.5).to(dtype),
        "bias": torch.randn(vocabulary, dtype=f64).to(dtype) if bias else None,
        "labels": labels,
        "base_dtype": dtype,
        "logits_dtype": torch.promote_types(dtype, f32),
        **PLAIN,
    }
    if rank:
        given_ |= {
            "lora_a": (torch.randn(rank, hidden, dtype=f64) * hidden**-0.5).to(dtype),
            "lora_b": torch.randn(vocabulary, rank, dtype=f64).to(dtype),
            "scaling": 0.6,
            "lora_dtype": dtype,
        }
    return given_ | others


OPTIONS: dict[str, Arguments] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.3},
    "softcap and scale": {"softcap": 3.0, "scale": 0.7},
    "ignores a word": {"ignore_index": 2, "reduction": "none", "label_smoothing": 0.1, "z_loss": 0.1},
    "adapter": {"rank": 2},
    "adapter, each": {"rank": 2, "reduction": "none", "softcap": 3.0},
}


def set_chunks(patch: pytest.MonkeyPatch, rows: int) -> None:
    patch.setattr(module, "chunk_rows", lambda *_: rows)
