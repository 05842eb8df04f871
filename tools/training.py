"""One training run with the Hugging Face Trainer, measured step by step."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from fastlora.tools.encoding import Encoded, collator
from fastlora.tools.settings import Settings

OnStep = Callable[["Run"], None]


@dataclass
class Run:
    """Measurements of a run, one entry per step; `tokens` counts tokens without padding."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak_gpu_bytes: int | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second without the first step, which includes compilation; None if there is no other."""
        return sum(self.tokens[1:]) / sum(self.seconds[1:]) if len(self.seconds) > 1 else None


def train(
    model: PeftModel, encoded: Encoded, tokenizer: Any, settings: Settings, scratch: Path, on_step: OnStep
) -> Run:
    """Train the adapters in place and return the measurements. The order of the data depends only on the seed."""
    run = Run()
    arguments = _arguments(settings, len(encoded.rows), scratch)
    on_gpu = arguments.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    trainer = _RecordingTrainer(
        run,
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(encoded.rows),
        data_collator=collator(tokenizer, encoded.longest),
        processing_class=tokenizer,
        callbacks=[_StepTimer(run, on_step)],
    )
    trainer.remove_callback(PrinterCallback)
    set_seed(settings.seed)
    trainer.train()
    if on_gpu:
        run.peak_gpu_bytes = torch.cuda.max_memory_allocated()
    return run


def _arguments(settings: Settings, rows: int, scratch: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(scratch),
        max_steps=settings.steps,
        per_device_train_batch_size=min(settings.batch_size, rows),
        dataloader_drop_last=True,  # a smaller last batch would be compiled again
        learning_rate=settings.effective_learning_rate,
        seed=settings.seed,
        use_cpu=not torch.cuda.is_available(),
        bf16=settings.bf16,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        include_num_input_tokens_seen="non_padding",
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    # With several GPUs, the Trainer would wrap the model in DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class _RecordingTrainer(Trainer):
    """A Trainer that records the loss of every step in full precision."""

    def __init__(self, run: Run, **options: Any) -> None:
        super().__init__(**options)
        self._run = run

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self._run.losses.append(loss.item())
        return loss


class _StepTimer(TrainerCallback):
    """Records the seconds and tokens of every step, and calls `on_step` after it."""

    def __init__(self, run: Run, on_step: OnStep) -> None:
        self._run, self._on_step = run, on_step
        self._last, self._tokens = 0.0, 0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._last = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        if args.device.type == "cuda":
            torch.cuda.synchronize()  # wait for the optimizer's kernels
        now = time.perf_counter()
        self._run.seconds.append(now - self._last)
        self._run.tokens.append(int(state.num_input_tokens_seen) - self._tokens)
        self._last, self._tokens = now, int(state.num_input_tokens_seen)
        self._on_step(self._run)
