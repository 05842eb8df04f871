"""Running and measuring training steps in a contender's process.

A step is forward with the loss, backward, AdamW and zero_grad, under bfloat16 autocast. There is no synchronization
between steps, as in a training loop that does not read its loss. With batches of changing lengths, the time of a step
is the mean over all batches, and `steps` and `warmup` count rounds over them. The first step is timed until the device
has finished, compilation included; the compile caches are empty (`processes.py`). `prepare_seconds` is the time from a
contender's imports until its model is ready.

Memory is measured on CUDA only. `peak_bytes` is the peak of PyTorch's allocator during the timed steps. `extra_bytes`
is the peak without what every contender needs: parameters, buffers, optimizer states and the batches. So activations,
gradients, copies of weights and workspaces, including cuBLAS's, count as extra. The first step has a peak of its own,
because compilers may need more memory.
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
    """A model, its optimizer, and the batches that it is trained on in turn; the first batch has the most tokens."""

    def __init__(self, model: Any, batches: list[dict[str, Any]], device: torch.device) -> None:
        self.model, self.batches, self.device = model.train(), batches, device
        self._next = 0
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=LEARNING_RATE, fused=True)

    def forward_backward(self) -> torch.Tensor:
        """Run forward and backward, and return the loss."""
        loss = compute_loss(self.model, self.batches[self._next], self.device)
        self._next = (self._next + 1) % len(self.batches)
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        self.forward_backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> dict[str, torch.Tensor]:
        return gradients(self.model)

    def required_bytes(self) -> int:
        """Return the bytes that any contender needs on the device between two steps."""
        states = [v for state in self.optimizer.state.values() for v in state.values()]
        tensors = [
            *self.model.parameters(),
            *self.model.buffers(),
            *states,
            *(t for batch in self.batches for t in batch.values()),
        ]
        on_device = [t for t in tensors if isinstance(t, torch.Tensor) and t.device.type == self.device.type]
        return sum({t.data_ptr(): t.nbytes for t in on_device}.values())


def compute_loss(model: Any, batch: dict[str, Any], device: torch.device, autocast: bool = True) -> torch.Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        return model(**batch).loss


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """Return the gradients by parameter name, on the CPU in float32."""
    return {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}


def save_gradients(tensors: dict[str, torch.Tensor], path: Path) -> float:
    """Write gradients to a safetensors file, and return the norm of all of them together."""
    from safetensors.torch import save_file

    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
    return torch.stack([value.double().norm() for value in tensors.values()]).norm().item() if tensors else 0.0


def measure(trainer: Trainer, steps: int, warmup: int, path: Path) -> dict[str, Any]:
    """Run the first step, saving its gradients, then the warmup and the timed steps, and return the measurements."""
    result = _first_step(trainer, path)
    num_batches = len(trainer.batches)
    for _ in range(warmup * num_batches):
        trainer.step()
    _reset_peak(trainer.device)
    seconds, wall = _timed(trainer, steps * num_batches)
    tokens = sum(batch["input_ids"].numel() for batch in trainer.batches) / num_batches
    typical_seconds = statistics.median(seconds) if num_batches == 1 else wall / len(seconds)
    peak = _peak(trainer.device)
    return result | {
        "seconds": typical_seconds,
        "all_seconds": seconds,
        "wall_seconds": wall / len(seconds),
        "tokens_per_second": tokens / typical_seconds,
        "peak_bytes": peak,
        "extra_bytes": None if peak is None else peak - trainer.required_bytes(),
    }


def _first_step(trainer: Trainer, path: Path) -> dict[str, Any]:
    _reset_peak(trainer.device)
    started = time.perf_counter()
    loss = trainer.forward_backward()
    trainer.optimizer.step()
    _synchronize(trainer.device)
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
    """Return the device time of each step and the wall time of all, in seconds. Without CUDA both are wall times."""
    if trainer.device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(steps):
            trainer.step()
            times.append(time.perf_counter())
        return [after - before for before, after in itertools.pairwise(times)], times[-1] - times[0]
    _synchronize(trainer.device)
    started = time.perf_counter()
    events = [_event()]
    for _ in range(steps):
        trainer.step()
        events.append(_event())
    _synchronize(trainer.device)
    wall = time.perf_counter() - started
    return [before.elapsed_time(after) / 1e3 for before, after in itertools.pairwise(events)], wall


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None
