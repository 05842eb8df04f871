"""What a step's loss and gradients should be, and how far eager PyTorch is from that.

The truth is the same weights in float32 throughout; eager's own error is that of bfloat16 under autocast. Both run one
sequence at a time with checkpointing, so that they fit where a whole step does not: the sequences are equally long, so
the loss of the batch is the mean of theirs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastlora.tools.bench.step import weights
from fastlora.tools.bench.step.measurement import gradients, loss_of, save_gradients
from fastlora.tools.bench.step.preparations import checkpoint

TRUTH, ROUNDED = "truth.safetensors", "eager.safetensors"


def write_truth(folder: Path, rows: int, length: int, device: torch.device) -> dict[str, Any]:
    """Writes both sets of gradients into the folder; returns both losses."""
    torch.set_float32_matmul_precision("highest")
    losses = {}
    for name, dtype in ((ROUNDED, torch.bfloat16), (TRUTH, torch.float32)):
        model = weights.adapted(weights.load(folder, device, dtype), folder).train()
        checkpoint(model)
        with _keys_for_each_head():
            losses[name] = _accumulate(model, rows, length, device, autocast=dtype == torch.bfloat16)
        save_gradients(gradients(model), folder / name)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return {"loss": losses[TRUTH], "eager_loss": losses[ROUNDED]}


@contextmanager
def _keys_for_each_head() -> Iterator[None]:
    """Has transformers repeat keys and values for every head. No kernel shares them in float32, and where PyTorch is
    asked to it falls back to a form whose memory grows with the square of the length."""
    from transformers.integrations import sdpa_attention

    usual = sdpa_attention.use_gqa_in_sdpa
    sdpa_attention.use_gqa_in_sdpa = lambda *_: False
    try:
        yield
    finally:
        sdpa_attention.use_gqa_in_sdpa = usual


def _accumulate(model: Any, rows: int, length: int, device: torch.device, autocast: bool) -> float:
    batch = weights.batch(model.config.vocab_size, rows, length, device)
    total = 0.0
    for row in range(rows):
        one = {**batch, **{name: batch[name][row : row + 1] for name in ("input_ids", "labels")}}
        loss = loss_of(model, one, device, autocast) / rows
        loss.backward()
        total += loss.item()
    return total
