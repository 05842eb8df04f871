"""Running and measuring training steps in a contender's process.

A step is forward with the loss, backward, AdamW and zero_grad, under bfloat16 autocast. Steps are not waited for one by
one, as in a training loop that does not look at its loss. With batches of changing lengths a step is the mean over all
of them, each of which is then trained on as often as `steps` and `warmup` say. The first one is timed from its call
until the device has finished, its compilation included: a worker's compile caches are empty (`processes.py`). What a
contender does before, from its imports to the model that is ready, is `prepare_seconds`.

Memory, on CUDA only: `peak_bytes` is the most that PyTorch's allocator had given out during the timed steps, and
`extra_bytes` that less what any contender must hold: the bytes on the device of parameters, buffers, optimizer states
and the batch. What a contender keeps from step to step (workspaces, copies of weights) thus counts as extra, and so do
activations, gradients and cuBLAS's workspace. The first step's peak is apart: compilers may need more in it.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import torch

LEARNING_RATE = 1e-4


class Trainer:
    """A model, its optimizer, and the batches that it is trained on in turn, the first of which has most tokens."""

    def __init__(self, model: Any, batches: list[dict[str, Any]], device: torch.device) -> None:
        self.model, self.batches, self.device = model.train(), batches, device
        self._next = 0
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=LEARNING_RATE, fused=True)

    def differentiate(self) -> torch.Tensor:
        """Forward and backward; returns the loss."""
        loss = loss_of(self.model, self.batches[self._next], self.device)
        self._next = (self._next + 1) % len(self.batches)
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        self.differentiate()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> dict[str, torch.Tensor]:
        return gradients(self.model)

    def held_bytes(self) -> int:
        """What any contender must hold on the device between two steps."""
        states = [v for state in self.optimizer.state.values() for v in state.values()]
        tensors = [
            *self.model.parameters(),
            *self.model.buffers(),
            *states,
            *(t for batch in self.batches for t in batch.values()),
        ]
        on_device = [t for t in tensors if isinstance(t, torch.Tensor) and t.device.type == self.device.type]
        return sum({t.data_ptr(): t.nbytes for t in on_device}.values())


def loss_of(model: Any, batch: dict[str, Any], device: torch.device, autocast: bool = True) -> torch.Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        return model(**batch).loss


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """The adapters' gradients by the parameters' names, on the CPU in float32."""
    return {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}


def save_gradients(found: dict[str, torch.Tensor], path: Path) -> float:
    """Writes them, and returns their norm."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in found.items()}, path)
    return torch.stack([value.double().norm() for value in found.values()]).norm().item() if found else 0.0


def measure(trainer: Trainer, steps: int, warmup: int, path: Path) -> dict[str, Any]:
    """The first step by itself, its gradients into a file, steps to warm up, and the timed ones."""
    result = _first_step(trainer, path)
    several = len(trainer.batches)
    for _ in range(warmup * several):
        trainer.step()
    _reset_peak(trainer.device)
    seconds, wall = _timed(trainer, steps * several)
    tokens = sum(batch["input_ids"].numel() for batch in trainer.batches) / several
    typical = statistics.median(seconds) if several == 1 else wall / len(seconds)
    peak = _peak(trainer.device)
    return result | {
        "seconds": typical,
        "all_seconds": seconds,
        "wall_seconds": wall / len(seconds),
        "tokens_per_second": tokens / typical,
        "peak_bytes": peak,
        "extra_bytes": None if peak is None else peak - trainer.held_bytes(),
    }


def _first_step(trainer: Trainer, path: Path) -> dict[str, Any]:
    _reset_peak(trainer.device)
    started = time.perf_counter()
    loss = trainer.differentiate()
    trainer.optimizer.step()
    _wait(trainer.device)
    seconds = time.perf_counter() - started
    peak = _peak(trainer.device)
    norm = save_gradients(trainer.gradients(), path)
    trainer.optimizer.zero_grad()
    return {
        "loss": loss.item(),
        "gradient_norm": norm,
        "first_step_seconds": seconds,
        "first_step_peak_bytes": peak,
    }


def _timed(trainer: Trainer, steps: int) -> tuple[list[float], float]:
    """Seconds of each step on the device, and of all of them on the wall; without CUDA the device is the wall."""
    if trainer.device.type != "cuda":
        marks = [time.perf_counter()]
        for _ in range(steps):
            trainer.step()
            marks.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(marks)], marks[-1] - marks[0]
    _wait(trainer.device)
    started = time.perf_counter()
    events = [_event()]
    for _ in range(steps):
        trainer.step()
        events.append(_event())
    _wait(trainer.device)
    wall = time.perf_counter() - started
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)], wall


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None
