"""Loss and gradients of a step in float32, and in eager PyTorch under bfloat16 autocast, to measure errors by.

Both use the same weights and run one sequence at a time with checkpointing, to save memory. All sequences have the same
length, so the loss of the batch is the mean of their losses.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastlora.tools.bench.step import weights
from fastlora.tools.bench.step.measurement import compute_loss, gradients, save_gradients
from fastlora.tools.bench.step.preparations import enable_checkpointing

REFERENCE, EAGER = "reference.safetensors", "eager.safetensors"


def write_reference(folder: Path, rows: int, length: int, device: torch.device) -> dict[str, Any]:
    """Write both sets of gradients into the folder, and return both losses."""
    torch.set_float32_matmul_precision("highest")
    losses = {}
    for name, dtype in ((EAGER, torch.bfloat16), (REFERENCE, torch.float32)):
        model = weights.add_adapters(weights.load(folder, device, dtype), folder).train()
        enable_checkpointing(model)
        with _repeated_keys_and_values():
            losses[name] = _accumulate(model, rows, length, device, autocast=dtype == torch.bfloat16)
        save_gradients(gradients(model), folder / name)
        del model
        gc.collect()
        torch.cuda.empty_cache()
    return {"loss": losses[REFERENCE], "eager_loss": losses[EAGER]}


@contextmanager
def _repeated_keys_and_values() -> Iterator[None]:
    """Make transformers repeat keys and values for every head. No attention kernel supports grouped-query attention in
    float32, and PyTorch's fallback needs memory quadratic in the length."""
    from transformers.integrations import sdpa_attention

    original = sdpa_attention.use_gqa_in_sdpa
    sdpa_attention.use_gqa_in_sdpa = lambda *_: False
    try:
        yield
    finally:
        sdpa_attention.use_gqa_in_sdpa = original


def _accumulate(model: Any, rows: int, length: int, device: torch.device, autocast: bool) -> float:
    batch = weights.make_batch(model.config.vocab_size, rows, length, device)
    total = 0.0
    for row in range(rows):
        one = {**batch, **{name: batch[name][row : row + 1] for name in ("input_ids", "labels")}}
        loss = compute_loss(model, one, device, autocast) / rows
        loss.backward()
        total += loss.item()
    return total
