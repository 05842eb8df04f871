"""Terminal output of `fastlora finetune`."""

from collections import Counter
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastlora.tools.comparison import Comparison
from fastlora.tools.encoding import Encoded
from fastlora.tools.settings import Settings
from fastlora.tools.training import OnStep, Run

SHOWN_STEPS = 6


def progress_bar(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[measured]}"),
        TimeElapsedColumn(),
        console=console,
    )


def add_bar(progress: Progress, name: str, steps: int) -> OnStep:
    """Add a progress bar for a run, and return the function that updates it after every step."""
    task = progress.add_task(name, total=steps, measured="first step")

    def on_step(run: Run) -> None:
        speed = run.tokens_per_second
        measured = f"loss {run.losses[-1]:.4f}" + (f"  {speed:,.0f} tokens/s" if speed else "")
        progress.update(task, completed=len(run.losses), measured=measured)

    return on_step


def show_start(console: Console, settings: Settings, encoded: Encoded, trainable: int, total: int) -> None:
    data = settings.data or "the built-in instructions"
    lines = [
        f"Model     {settings.model_name}; LoRA of rank {settings.rank} trains {trainable:,} of {total:,} weights",
        f"Data      {data}: {encoded.examples:,} examples",
    ]
    if encoded.cut:
        lines.append(f"          {encoded.cut:,} cut to --max-length {settings.max_length} tokens")
    if encoded.dropped:
        lines.append(f"          {encoded.dropped:,} dropped: no label within --max-length")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def show_losses(console: Console, comparison: Comparison) -> None:
    table = Table(title="Loss of the same steps, from the same weights")
    for heading in ("step", "eager", "fastlora", "relative difference"):
        table.add_column(heading, justify="right")
    for step in _steps_to_show(len(comparison.eager), comparison.largest_step):
        index = step - 1
        table.add_row(
            str(step),
            f"{comparison.eager[index]:.6f}",
            f"{comparison.fused[index]:.6f}",
            f"{comparison.differences[index]:.1e}" + (" (largest)" if step == comparison.largest_step else ""),
        )
    console.print(table)
    if not comparison.within_bound:
        console.print(
            f"[bold red]fastlora changes the loss by {comparison.largest:.1e} at step {comparison.largest_step}, "
            f"more than the bound of {comparison.bound:.0e}. Do not trust this run; please report it."
        )


def _steps_to_show(count: int, largest: int) -> list[int]:
    """Return evenly spaced steps, from the first to the last, and the one with the largest difference."""
    spread = {1 + round(i * (count - 1) / (SHOWN_STEPS - 1)) for i in range(SHOWN_STEPS)}
    return sorted(spread | {largest})


def show_speed(console: Console, fused: Run, eager: Run | None, peak_process_bytes: int) -> None:
    table = Table(
        title="Speed and memory",
        caption="tokens/s: without padding and without the first step,\nin which fastlora compiles",
    )
    on_gpu = fused.peak_gpu_bytes is not None
    for heading in ("", "first step", "tokens/s", *(["peak GPU memory"] if on_gpu else [])):
        table.add_column(heading, justify="right" if heading else "left")
    for name, run in (("eager", eager), ("fastlora", fused)):
        if run is not None:
            speed = f"{run.tokens_per_second:,.0f}" if run.tokens_per_second else "-"
            memory = [] if run.peak_gpu_bytes is None else [mebibytes(run.peak_gpu_bytes)]
            table.add_row(name, f"{run.seconds[0]:.1f} s", speed, *memory)
    console.print(table)
    if not on_gpu:
        console.print(f"Peak memory of the whole process: {mebibytes(peak_process_bytes)}", highlight=False)


def show_coverage(console: Console, report: Any) -> None:
    table = Table(title="What was fused")
    table.add_column("operation")
    table.add_column("found", justify="right")
    table.add_column("fused", justify="right")
    for name, item in report.coverage.items():
        table.add_row(escape(name), str(item.seen), str(item.fused))
    console.print(table)
    if report.missed:
        missed = Table(title="What was not fused, and why")
        missed.add_column("operation")
        missed.add_column("count", justify="right")
        missed.add_column("reason")
        for miss in report.missed:
            missed.add_row(escape(miss.op), str(miss.count), escape(miss.reason))
        console.print(missed)
    for note in report.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}", highlight=False)
    # TorchDynamo's texts are long and repeated for every layer. The summary file has them in full.
    for reason, count in Counter(text.strip().split("\n")[0] for text in report.breaks).items():
        console.print(f"[yellow]Graph break[/] ({count} times): {escape(reason)}", highlight=False)


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"
