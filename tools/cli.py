"""The command line. PyTorch and transformers are imported inside the commands, so that `--help` is quick."""

import inspect
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import fastlora
from fastlora.tools.errors import RunError, UsageError
from fastlora.tools.settings import Lower, Settings

DEFAULTS = Settings()
INTERRUPTED = 130
FILE_WIDTH = 130
"""Columns of a table that is not printed on a terminal."""
# The base of all complaints of the argument parser, which typer keeps in a private module.
ARGUMENT_ERROR: type[typer.BadParameter] = typer.BadParameter.__mro__[1]
NEEDED = ("accelerate", "datasets", "matplotlib")

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Model = Annotated[
    str | None, typer.Option(metavar="PATH_OR_HUB_ID", help="A causal language model; default: a small built-in Llama.")
]
Data = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.jsonl",
        help="One JSON object per line with prompt and completion, or messages, or text; default: built-in data.",
    ),
]
MaxLength = Annotated[int, typer.Option(help="Cut examples to this many tokens.")]
BatchSize = Annotated[int, typer.Option(help="Examples per step.")]
Dropout = Annotated[float, typer.Option(help="Dropout in front of the adapters.")]
Checkpointing = Annotated[bool, typer.Option("--gradient-checkpointing", help="Recompute activations to save memory.")]
Bfloat16 = Annotated[bool, typer.Option("--bf16", help="Frozen weights and arithmetic in bfloat16, not float32.")]
FourBits = Annotated[
    bool, typer.Option("--load-in-4bit", help="QLoRA: frozen weights in 4 bits (NF4, with double quantization).")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastlora {fastlora.__version__}")
        raise typer.Exit()


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fast LoRA fine-tuning: a compiler pass for PyTorch transformers."""


@app.command()
def finetune(
    model: Model = None,
    data: Data = None,
    output: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder for the results; those of an earlier run are replaced.")
    ] = DEFAULTS.output,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = DEFAULTS.steps,
    batch_size: BatchSize = DEFAULTS.batch_size,
    max_length: MaxLength = DEFAULTS.max_length,
    rank: Annotated[int, typer.Option(help="Rank of the LoRA adapters.")] = DEFAULTS.rank,
    alpha: Annotated[int, typer.Option(help="The adapters are scaled by alpha / rank.")] = DEFAULTS.alpha,
    dropout: Dropout = DEFAULTS.dropout,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate.", show_default="2e-4; 1e-2 for the built-in model")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the adapters and of the order of the data.")] = DEFAULTS.seed,
    lower: Annotated[Lower, typer.Option(help="How the rewritten graph is turned into code.")] = DEFAULTS.lower,
    gradient_checkpointing: Checkpointing = False,
    bf16: Bfloat16 = False,
    load_in_4bit: FourBits = False,
    compare: Annotated[bool, typer.Option(help="Train eagerly first, and compare the losses.")] = True,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop with an error if a candidate for fusion is not fused.")
    ] = False,
) -> None:
    """Fine-tune a model with LoRA through fastlora; without options, a small built-in one."""
    _check_installed()
    from fastlora.tools.finetune import finetune as run

    settings = Settings(
        model=model,
        data=data,
        output=output,
        steps=steps,
        batch_size=batch_size,
        max_length=max_length,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        learning_rate=learning_rate,
        seed=seed,
        lower=lower,
        gradient_checkpointing=gradient_checkpointing,
        bf16=bf16,
        load_in_4bit=load_in_4bit,
        compare=compare,
        strict=strict,
    )
    run(settings, Console())


def _on_one_batch(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that runs one batch of a model the options of `_batch_settings`, and pass it the settings."""
    shared, own = (dict(inspect.signature(each).parameters) for each in (_batch_settings, command))
    own.pop("settings")

    def run(**given: Any) -> None:
        _check_installed()
        command(_batch_settings(**{name: given.pop(name) for name in shared}), **given)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__annotations__ = {name: each.annotation for name, each in {**shared, **own}.items()}
    run.__signature__ = inspect.Signature([*shared.values(), *own.values()])  # type: ignore[attr-defined]
    return run


def _batch_settings(
    *,
    model: Model = None,
    data: Data = None,
    batch_size: BatchSize = DEFAULTS.batch_size,
    max_length: MaxLength = DEFAULTS.max_length,
    dropout: Dropout = DEFAULTS.dropout,
    gradient_checkpointing: Checkpointing = False,
    bf16: Bfloat16 = False,
    load_in_4bit: FourBits = False,
) -> Settings:
    return Settings(
        model=model,
        data=data,
        batch_size=batch_size,
        max_length=max_length,
        dropout=dropout,
        gradient_checkpointing=gradient_checkpointing,
        bf16=bf16,
        load_in_4bit=load_in_4bit,
    )


@app.command()
@_on_one_batch
def explain(
    settings: Settings,
    *,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the report as JSON.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the report as HTML.")] = None,
) -> None:
    """Show what fastlora would fuse in a model with LoRA adapters, and why it would not fuse the rest."""
    from fastlora.tools.explain import explain as run

    run(settings, Console(), json=json, html=html)


@app.command()
@_on_one_batch
def check(
    settings: Settings,
    *,
    defer_logits: Annotated[bool, typer.Option(help="Fuse the output head with the loss.")] = True,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the result as JSON.")] = None,
) -> None:
    """Check that a training step of a model with LoRA adapters has the loss and gradients of eager PyTorch."""
    from fastlora.tools.check import check as run

    if not run(settings, Console(), defer_logits=defer_logits, json=json):
        raise RunError("the compiled step differs from the eager one; the lines above say where")


@app.command()
def doctor(
    kernels: Annotated[bool, typer.Option("--kernels", help="Test the kernels on this machine's GPU.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show every test.")] = False,
) -> None:
    """Show versions, devices and private APIs of PyTorch that changed; optionally, test the kernels."""
    from fastlora.tools.doctor import doctor as run

    run(Console(), kernels=kernels, verbose=verbose)


@app.command()
def zoo(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TYPE]...", help="Model types, or an auto class; default: all."),
    ] = None,
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results, one line of JSON each.")] = Path(
        "fastlora-zoo"
    ),
    way: Annotated[
        list[str] | None,
        typer.Option(help="Way to train, or all; with commas, may be repeated.", show_default="plain"),
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes at a time.")] = 2,
    seconds: Annotated[float, typer.Option(help="Time after which a process is stopped.")] = 120,
    resume: Annotated[bool, typer.Option(help="Keep the results of an earlier run.")] = True,
    page: Annotated[Path | None, typer.Option(metavar="FILE.md", help="Also write a page of results.")] = None,
    golden: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Also write the results that tests compare with.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the model types and exit.")] = False,
) -> None:
    """Train a tiny model of every architecture in transformers, eager and compiled, and compare them."""
    from fastlora.tools.zoo.architectures import architectures
    from fastlora.tools.zoo.command import Options, run

    if list_:
        print("\n".join(architectures()))
    elif not run(Options(output, names or [], _split(way), jobs, seconds, resume, page, golden), Console()):
        raise RunError("some architectures fail or differ once compiled; the lines above say which")


bench = typer.Typer(help="Compare fastlora with others; only what passes a check against float64 is timed.")
app.add_typer(bench, name="bench")


@bench.command()
def kernels(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for tables and plots.")] = Path("fastlora-bench"),
    models: Annotated[list[str] | None, typer.Option(help="Model whose sizes to take; may be repeated.")] = None,
    ops: Annotated[list[str] | None, typer.Option(help="Op to measure; may be repeated.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens in a batch; may be repeated.")] = None,
    ranks: Annotated[list[int] | None, typer.Option(help="Rank of the adapters; may be repeated.")] = None,
    contenders: Annotated[list[str] | None, typer.Option(help="What to compare with; may be repeated.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    timed: Annotated[bool, typer.Option("--time/--only-check", help="Whether to time what passes the check.")] = True,
    seconds: Annotated[float | None, typer.Option(help="Start no further case after this time.")] = None,
) -> None:
    """Time each op on this GPU, and compare with eager PyTorch, torch.compile, Liger and Unsloth."""
    _check_installed()
    from fastlora.tools.bench.command import Options, run

    chosen = Options(
        output=output,
        models=models or [],
        ops=ops or [],
        tokens=tokens or [],
        ranks=ranks or [],
        contenders=contenders or [],
        dtype=dtype,
        timed=timed,
        seconds=seconds,
    )
    if not run(chosen, Console()):
        raise RunError("some ops are less accurate than allowed, and were not timed")


@bench.command()
def step(
    output: Annotated[Path, typer.Option(metavar="DIR", help="Folder for tables, plots and logs.")] = Path(
        "fastlora-bench-step"
    ),
    model: Annotated[str, typer.Option(help="Model whose sizes to take, with random weights.")] = "Llama-3.1-8B",
    layers: Annotated[int | None, typer.Option(help="Layers.", show_default="the model's own number")] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROWSxLENGTH",
            help="Sequences x tokens in each, or 4x128-1024 for changing lengths; may be repeated.",
            show_default="4x2048",
        ),
    ] = None,
    contenders: Annotated[
        list[str] | None,
        typer.Option(
            help="What to compare, separated by commas; may be repeated. fastlora@9GiB has that memory budget.",
            show_default="all",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps to time.")] = 10,
    warmup: Annotated[int, typer.Option(help="Steps after the first one that are not timed.")] = 3,
    timeout: Annotated[float, typer.Option(help="Seconds after which a contender is stopped.")] = 900,
    profile: Annotated[bool, typer.Option("--profile", help="Also show where each contender's GPU time goes.")] = False,
    quant: Annotated[
        str | None, typer.Option(help="Quantize the base layers: nf4 or fp4.", show_default="16 bits")
    ] = None,
) -> None:
    """Time a whole LoRA training step and measure its memory; compare with eager, torch.compile, Liger and Unsloth."""
    _check_installed()
    from fastlora.tools.bench.step.command import Options, run

    chosen = Options(
        output=output,
        model=model,
        layers=layers,
        batches=_split(batch) or ["4x2048"],
        contenders=_split(contenders),
        steps=steps,
        warmup=warmup,
        timeout=timeout,
        profile=profile,
        quant=quant,
    )
    if not run(chosen, Console(width=None if sys.stdout.isatty() else FILE_WIDTH)):
        raise RunError("fastlora is not ranked everywhere; the lines above say why")


@bench.command()
def page(
    results: Annotated[list[Path], typer.Argument(metavar="RESULTS.json...", help="What `bench kernels` wrote.")],
    output: Annotated[Path, typer.Option(metavar="FILE.md", help="File for the page.")] = Path("benchmarks.md"),
    notes: Annotated[Path | None, typer.Option(metavar="FILE.md", help="Text to put before the tables.")] = None,
) -> None:
    """Write a page of results: each op and its target, where fastlora is slower, all times, all errors."""
    _check_installed()
    from fastlora.tools.bench.page import write

    write(results, output, notes)


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit code: 2 for wrong arguments, 1 for a failed run, 130 after Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        result = app(args=arguments or ["--help"], standalone_mode=False)
    except (UsageError, RunError) as problem:
        return _fail(str(problem), problem.exit_code)
    except ARGUMENT_ERROR as problem:
        return _fail(problem.format_message(), problem.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        result = INTERRUPTED  # some versions of typer return this, others raise
    if result == INTERRUPTED:
        return _fail("interrupted", INTERRUPTED)
    return result if isinstance(result, int) else 0


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


def _split(given: list[str] | None) -> list[str]:
    """The names in options that may be repeated, or hold several with commas between; each once."""
    return list(dict.fromkeys(name for text in given or [] for name in text.split(",") if name))


def _check_installed() -> None:
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} not installed; run: pip install 'fastlora-fx[train]'")


if __name__ == "__main__":
    sys.exit(main())
