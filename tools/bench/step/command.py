"""Implementation of `fastlora bench step`: run each contender in a process, check its gradients, show the table."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from fastlora.tools.bench.step import results
from fastlora.tools.bench.step.agreement import Reference, disagreement, errors, relative_error
from fastlora.tools.bench.step.batches import Batches, parse
from fastlora.tools.bench.step.contenders import CONTENDERS, Contender, get_contender
from fastlora.tools.bench.step.limit import limit
from fastlora.tools.bench.step.models import MODELS
from fastlora.tools.bench.step.processes import run_worker
from fastlora.tools.bench.step.reference import EAGER, REFERENCE
from fastlora.tools.errors import RunError, UsageError
from fastlora.tools.output import writing
from fastlora.tools.quantization import FORMATS, check_bitsandbytes

LOGS = "logs"


@dataclass(frozen=True)
class Options:
    """Options of `fastlora bench step`.

    Attributes:
        layers: number of layers; None for the model's own.
        batches: see `batches.parse`.
        contenders: names of contenders; empty for all.
        quant: 4-bit format of the base layers; None for bfloat16.
    """

    output: Path
    model: str = "Llama-3.1-8B"
    layers: int | None = None
    batches: list[str] = field(default_factory=lambda: ["4x2048"])
    contenders: list[str] = field(default_factory=list)
    steps: int = 10
    warmup: int = 3
    timeout: float = 900.0
    profile: bool = False
    quant: str | None = None


def run(options: Options, console: Console) -> bool:
    """Run the benchmark, and return whether fastlora passed the check everywhere.

    Raises:
        UsageError: for an invalid argument.
        RunError: if the weights cannot be made, or the results cannot be written.
    """
    batches = _check(options)
    with writing(options.output):
        (options.output / LOGS).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastlora-step-", ignore_cleanup_errors=True) as scratch:
        benchmark = StepBenchmark(options, Path(scratch), console)
        benchmark.prepare(batches)
        for each in batches:
            benchmark.measure(each)
    console.print(f"see {options.output}: {', '.join(benchmark.written)}, {LOGS}", markup=False, highlight=False)
    return is_ranked_everywhere(benchmark.rows)


def is_ranked_everywhere(rows: list[results.Row]) -> bool:
    """Return whether no contender that uses fastlora is wrong, unchecked or failed."""
    ours = [row for row in rows if get_contender(row["contender"]).is_fastlora]
    return all(row["status"] == results.RANKED for row in ours)


class StepBenchmark:
    """A run of the benchmark: its options, the scratch folder with weights and gradients, and the results so far."""

    def __init__(self, options: Options, scratch: Path, console: Console) -> None:
        self.options, self.scratch, self.console = options, scratch, console
        self.layers = options.layers or MODELS[options.model].layers
        self.environment = results.environment()
        self.ceilings: dict[str, Any] | None = None
        self.limits: list[dict[str, Any]] = []
        self.rows: list[results.Row] = []
        self.written: list[str] = []

    @property
    def conditions(self) -> results.Row:
        return {
            **self.environment,
            "model": self.options.model,
            "layers": self.layers,
            "quant": self.options.quant,
            "steps": self.options.steps,
            "warmup": self.options.warmup,
            "ceilings": self.ceilings,
            "limits": self.limits,
        }

    def prepare(self, batches: list[Batches]) -> None:
        """Make the weights, and measure the peak rates on CUDA."""
        model = self.options.model
        made = self._run("save_weights", "save-weights", model=model, layers=self.layers, quant=self.options.quant)
        if "error" in made:
            raise RunError(f"{model} with {self.layers} layers could not be made: {made['error']}")
        if torch.cuda.is_available():
            constant = [(each.rows, each.length) for each in batches if each.is_constant]
            found = self._run("ceilings", "ceilings", model=model, batches=constant)
            self.ceilings = None if self._failed("peak rates", found) else found

    def measure(self, batches: Batches) -> None:
        """Measure all contenders with one kind of batch. Results are written after each, in case the run is stopped."""
        limit_seconds = self._limit(batches.rows, batches.length) if batches.is_constant else None
        reference = self._reference(batches)
        earlier = self.rows
        rows: list[results.Row] = []
        for name in self.options.contenders or CONTENDERS:
            row = self._run_contender(get_contender(name), batches, reference)
            row |= {"limit_seconds": limit_seconds, "share_of_limit": _ratio(limit_seconds, row.get("seconds"))}
            time = f"{row['seconds'] * 1e3:.2f} ms" if row.get("seconds") else "no time"
            self.console.print(f"{batches} {name}: {row['status']}, {time}", markup=False, highlight=False)
            rows = results.rank([*rows, row])
            self.rows = earlier + rows
            with writing(self.options.output):
                self.written = results.write(self.options.output, self.conditions, self.rows)
        quant = f" in {self.options.quant}" if self.options.quant else ""
        title = f"{self.options.model}{quant}, {self.layers} layers, {batches} tokens"
        self.console.print(results.table(rows, title))
        for row in rows:
            if "profile" in row:
                self.console.print(results.profile_table(row, self._limits_of_parts(batches.rows, batches.length)))
        for line in results.problems(rows):
            self.console.print(line, highlight=False, soft_wrap=True)

    def _limits_of_parts(self, rows: int, length: int) -> dict[str, float]:
        """Return the least seconds of each part, or {} if the peak rates were not measured."""
        return next((each["parts"] for each in self.limits if (each["rows"], each["length"]) == (rows, length)), {})

    def _limit(self, rows: int, length: int) -> float | None:
        """Return the least seconds of a step, or None if the peak rates were not measured."""
        if self.ceilings is None:
            return None
        quantized = self.options.quant is not None
        found = limit(MODELS[self.options.model], self.layers, rows, length, self.ceilings, quantized)
        self.limits.append({"rows": rows, "length": length, **found})
        milliseconds, backend = found["seconds"] * 1e3, found["attention_backend"]
        self.console.print(f"{rows}x{length} limit: {milliseconds:.2f} ms, attention by {backend}", highlight=False)
        return found["seconds"]

    def _reference(self, batches: Batches) -> Reference | None:
        found = self._run("reference", f"reference-{batches}", rows=batches.rows, length=batches.length)
        if self._failed("float32 reference", found):
            return None
        path = self.scratch / REFERENCE
        return Reference(path, found["loss"], errors(self.scratch / EAGER, path), found["eager_loss"])

    def _run_contender(self, contender: Contender, batches: Batches, reference: Reference | None) -> results.Row:
        gradients = self.scratch / "gradients.safetensors"
        gradients.unlink(missing_ok=True)
        found = self._run(
            "run_contender",
            f"{contender.name}-{batches}",
            prepare=contender.prepare,
            options=contender.options,
            rows=batches.rows,
            lengths=batches.lengths(),
            steps=self.options.steps,
            warmup=self.options.warmup,
            gradients=str(gradients),
            profile=self.options.profile,
        )
        row = {"contender": contender.name, "batch": str(batches), **batches._asdict(), "extra_bytes": None}
        if "error" in found:
            return row | {"status": "failed", "problem": found["error"]}
        return row | found | check_step(contender, gradients, found["loss"], reference)

    def _run(self, role: str, name: str, **arguments: Any) -> dict[str, Any]:
        log = self.options.output.resolve() / LOGS / f"{name}.log"
        return run_worker(role, self.scratch, log, self.options.timeout, **arguments)

    def _failed(self, what: str, found: dict[str, Any]) -> bool:
        if "error" in found:
            self.console.print(f"[red]no {what}:[/] {escape(found['error'])}", highlight=False, soft_wrap=True)
        return "error" in found


def check_step(contender: Contender, gradients: Path, loss: float, reference: Reference | None) -> results.Row:
    """Return the status of a contender, with the errors of its loss and gradients."""
    if reference is None:
        return {"status": "unchecked", "problem": "there is no float32 reference to compare with; try fewer --layers"}
    found = errors(gradients, reference.path)
    problem = disagreement(found, loss, reference, contender.ratio)
    worst = found.worst if found.tensors else None
    return {
        "status": "wrong" if problem else results.RANKED,
        "problem": problem,
        "loss_error": relative_error(loss, reference.loss),
        "eager_loss_error": reference.eager_loss_error,
        "gradient_error": found.step,
        "eager_gradient_error": reference.eager.step,
        "times_eager_error": _ratio(found.step, reference.eager.step),
        "worst_tensor": worst,
        "worst_tensor_error": found.tensors[worst] if worst else None,
        "tensor_errors": found.tensors,
    }


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None


def _check(options: Options) -> list[Batches]:
    """Check the options, and return the parsed batches."""
    if options.model not in MODELS:
        raise UsageError(f"--model {options.model}: unknown; choose from {', '.join(MODELS)}")
    for name in options.contenders:
        try:
            get_contender(name)
        except ValueError as problem:
            raise UsageError(f"--contenders {name}: {problem}") from None
    if options.quant is not None:
        if options.quant not in FORMATS:
            raise UsageError(f"--quant {options.quant}: unknown; choose from {', '.join(FORMATS)}")
        check_bitsandbytes(f"--quant {options.quant}")
    minimums = {"--layers": (options.layers, 1), "--steps": (options.steps, 1), "--warmup": (options.warmup, 0)}
    for option, (number, bound) in minimums.items():
        if number is not None and number < bound:
            raise UsageError(f"{option} {number}: must be a whole number of at least {bound}")
    if not options.timeout > 0:
        raise UsageError(f"--timeout {options.timeout:g}: must be more than 0 seconds")
    return [_batch(text) for text in options.batches]


def _batch(text: str) -> Batches:
    try:
        return parse(text)
    except ValueError as problem:
        raise UsageError(f"--batch {text}: {problem}") from None
