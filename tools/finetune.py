"""`fastlora finetune`: train the same steps eagerly and with fastlora, compare them, and save the adapter."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console

import fastlora
from fastlora.tools import show
from fastlora.tools.comparison import BFLOAT16_BOUND, FLOAT32_BOUND, Comparison
from fastlora.tools.dataset import builtin_data, read_examples
from fastlora.tools.encoding import Encoded, encode
from fastlora.tools.errors import RunError, UsageError, one_line
from fastlora.tools.models import load_model, load_tokenizer
from fastlora.tools.output import ADAPTER, CURVES, SUMMARY, check_output, output_folder, writing
from fastlora.tools.plots import plot_losses
from fastlora.tools.quiet import quiet
from fastlora.tools.settings import Settings
from fastlora.tools.summary import peak_process_bytes, summarize, write_summary
from fastlora.tools.training import Run, train


@dataclass
class Job:
    """The tokenizer, encoded data and model with adapters of a run."""

    settings: Settings
    tokenizer: Any
    encoded: Encoded
    model: PeftModel

    def reload_model(self) -> None:
        """Replace the trained model by a new one. It is freed first, as there may not be enough memory for both."""
        del self.model
        gc.collect()  # the Trainer and its model are in a reference cycle
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.model = load_model(self.settings)


def finetune(settings: Settings, console: Console) -> None:
    """Run `fastlora finetune`.

    Raises:
        UsageError: for invalid settings or data.
        RunError: if training fails, or the results cannot be written.
    """
    with quiet():
        settings.check()
        check_output(settings.output)
        job = prepare(settings)
        show.show_start(console, settings, job.encoded, *job.model.get_nb_trainable_parameters())
        with output_folder(settings.output) as folders:
            with run_errors():
                eager, fused = _train_both(job, folders.scratch, console)
            _finish(job, eager, fused, folders.results, console)
        console.print(f"Saved     {settings.output}: {ADAPTER}, {CURVES}, {SUMMARY}", markup=False, highlight=False)


@contextmanager
def run_errors() -> Iterator[None]:
    """Turn errors of fastlora and a lack of GPU memory into a `RunError`."""
    try:
        yield
    except fastlora.FastLoRAError as problem:
        raise RunError(f"fastlora stopped: {one_line(problem)}") from problem
    except torch.OutOfMemoryError as problem:
        raise RunError("out of GPU memory; lower --batch-size or --max-length, or try --bf16") from problem


def prepare(settings: Settings) -> Job:
    """Read and encode the data, load the model, and check that it has all tokens of the tokenizer."""
    examples = read_examples(settings.data or builtin_data())
    tokenizer = load_tokenizer(settings)
    encoded = encode(examples, tokenizer, settings.max_length)
    model = load_model(settings)
    largest = max(max(row["input_ids"]) for row in encoded.rows)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    if largest >= vocab_size:
        raise UsageError(
            f"--model {settings.model}: its tokenizer uses token {largest}, but the model has {vocab_size} embeddings"
        )
    return Job(settings, tokenizer, encoded, model)


def _train_both(job: Job, scratch: Path, console: Console) -> tuple[Run | None, Run]:
    """Return the eager run, or None with `--no-compare`, and the fastlora run, whose model is then `job.model`."""
    settings, eager = job.settings, None
    with show.progress_bar(console) as progress:
        if settings.compare:
            on_step = show.add_bar(progress, "eager", settings.steps)
            eager = train(job.model, job.encoded, job.tokenizer, settings, scratch, on_step)
            # A new model, because the Trainer modifies the one that it trains.
            job.reload_model()
        fastlora.compile(job.model, lower=settings.lower.value, strict=settings.strict)
        on_step = show.add_bar(progress, "fastlora", settings.steps)
        fused = train(job.model, job.encoded, job.tokenizer, settings, scratch, on_step)
    return eager, fused


def _finish(job: Job, eager: Run | None, fused: Run, folder: Path, console: Console) -> None:
    """Print the tables and write the results."""
    report = fastlora.report(job.model)
    comparison = None
    if eager is not None:
        bound = BFLOAT16_BOUND if job.settings.bf16 else FLOAT32_BOUND
        comparison = Comparison(eager.losses, fused.losses, bound)
        show.show_losses(console, comparison)
    show.show_speed(console, fused, eager, peak_process_bytes())
    show.show_coverage(console, report)
    with writing(job.settings.output):
        # Embeddings are not adapted; by default PEFT would check for changed ones.
        job.model.save_pretrained(folder / ADAPTER, save_embedding_layers=False)
        job.tokenizer.save_pretrained(folder / ADAPTER)
        plot_losses(folder / CURVES, fused.losses, eager.losses if eager else None)
        summary = summarize(job.settings, job.encoded, fused, eager, comparison, report)
        write_summary(folder / SUMMARY, summary)
