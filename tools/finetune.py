"""`fastlora finetune`: eager and fastlora side by side on the same steps, and an adapter to keep."""

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
from fastlora.tools.models import load_model, load_tokenizer
from fastlora.tools.output import ADAPTER, CURVES, SUMMARY, check_output, workplace, writing
from fastlora.tools.plots import plot_losses
from fastlora.tools.problems import RunError, UsageError, one_line
from fastlora.tools.quiet import quiet
from fastlora.tools.settings import Settings
from fastlora.tools.summary import peak_process_bytes, summarise, write_summary
from fastlora.tools.training import Run, train


@dataclass
class Job:
    """Tokenizer, encoded data and a model with adapters, checked against each other."""

    settings: Settings
    tokenizer: Any
    encoded: Encoded
    model: PeftModel

    def renew_model(self) -> None:
        """Put a fresh model in the place of the trained one, which is freed first: there may be no room for two."""
        del self.model
        gc.collect()  # a Trainer and its model refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.model = load_model(self.settings)


def finetune(settings: Settings, console: Console) -> None:
    """Check everything, train, show what was measured, and put the results into the output folder."""
    with quiet():
        settings.check()
        check_output(settings.output)
        job = prepare(settings)
        show.show_start(console, settings, job.encoded, *job.model.get_nb_trainable_parameters())
        with workplace(settings.output) as place:
            with run_errors():
                eager, fused = _train_both(job, place.scratch, console)
            _finish(job, eager, fused, place.results, console)
        console.print(f"Saved     {settings.output}: {ADAPTER}, {CURVES}, {SUMMARY}", markup=False, highlight=False)


@contextmanager
def run_errors() -> Iterator[None]:
    """Turn what fastlora refuses, and a lack of GPU memory, into a `RunError`."""
    try:
        yield
    except fastlora.FastLoRAError as problem:
        raise RunError(f"fastlora stopped: {one_line(problem)}") from problem
    except torch.OutOfMemoryError as problem:
        raise RunError("out of GPU memory; lower --batch-size or --max-length, or try --bf16") from problem


def prepare(settings: Settings) -> Job:
    """Read the data, load the model, and make sure that the two fit."""
    examples = read_examples(settings.data or builtin_data())
    tokenizer = load_tokenizer(settings)
    encoded = encode(examples, tokenizer, settings.max_length)
    model = load_model(settings)
    largest = max(max(row["input_ids"]) for row in encoded.rows)
    known = model.get_input_embeddings().weight.shape[0]
    if largest >= known:
        raise UsageError(f"--model {settings.model}: its tokenizer uses token {largest}, but the model knows {known}")
    return Job(settings, tokenizer, encoded, model)


def _train_both(job: Job, scratch: Path, console: Console) -> tuple[Run | None, Run]:
    """The eager run, if one was asked for, and the run through fastlora, whose model stays in the job."""
    settings, eager = job.settings, None
    with show.progress_bar(console) as progress:
        if settings.compare:
            on_step = show.follow(progress, "eager", settings.steps)
            eager = train(job.model, job.encoded, job.tokenizer, settings, scratch, on_step)
            # A fresh model, because the Trainer leaves its marks on the one that it has trained.
            job.renew_model()
        fastlora.compile(job.model, lower=settings.lower.value, strict=settings.strict)
        on_step = show.follow(progress, "fastlora", settings.steps)
        fused = train(job.model, job.encoded, job.tokenizer, settings, scratch, on_step)
    return eager, fused


def _finish(job: Job, eager: Run | None, fused: Run, folder: Path, console: Console) -> None:
    """Show the tables and write the results."""
    report = fastlora.report(job.model)
    comparison = None
    if eager is not None:
        bound = BFLOAT16_BOUND if job.settings.bf16 else FLOAT32_BOUND
        comparison = Comparison(eager.losses, fused.losses, bound)
        show.show_losses(console, comparison)
    show.show_speed(console, fused, eager, peak_process_bytes())
    show.show_coverage(console, report)
    with writing(job.settings.output):
        # Only linear layers are adapted, so there are no embeddings to look for.
        job.model.save_pretrained(folder / ADAPTER, save_embedding_layers=False)
        job.tokenizer.save_pretrained(folder / ADAPTER)
        plot_losses(folder / CURVES, fused.losses, eager.losses if eager else None)
        summary = summarise(job.settings, job.encoded, fused, eager, comparison, report)
        write_summary(folder / SUMMARY, summary)
