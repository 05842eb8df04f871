"""Runs `fastlora bench step`: a process for each contender, a check of its gradients, a table."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from fastlora.tools.bench.step import results
from fastlora.tools.bench.step.agreement import Truth, disagreement, errors, relative
from fastlora.tools.bench.step.batches import Batches, parse
from fastlora.tools.bench.step.contenders import CONTENDERS, Contender, named
from fastlora.tools.bench.step.limit import limit
from fastlora.tools.bench.step.models import MODELS
from fastlora.tools.bench.step.processes import work
from fastlora.tools.bench.step.truth import ROUNDED, TRUTH
from fastlora.tools.four_bits import FORMATS, check_installed
from fastlora.tools.output import writing
from fastlora.tools.problems import RunError, UsageError

LOGS = "logs"


@dataclass(frozen=True)
class Race:
    """What to measure; no layers means the model's own number, no contenders means all, and no quantisation 16 bits."""

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


def run(race: Race, console: Console) -> bool:
    """Measures a race; False if fastlora was wrong or failed somewhere.

    Raises:
        UsageError: for an argument that makes no sense.
        RunError: if the weights cannot be made, or the results cannot be written.
    """
    batches = _check(race)
    with writing(race.output):
        (race.output / LOGS).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastlora-step-", ignore_cleanup_errors=True) as scratch:
        track = Track(race, Path(scratch), console)
        track.prepare(batches)
        for each in batches:
            track.measure(each)
    console.print(f"see {race.output}: {', '.join(track.written)}, {LOGS}", markup=False, highlight=False)
    return all(row["status"] == results.RANKED for row in track.rows if named(row["contender"]).mine)


class Track:
    """The place of a race: its scratch folder with the weights, what it has measured so far."""

    def __init__(self, race: Race, scratch: Path, console: Console) -> None:
        self.race, self.scratch, self.console = race, scratch, console
        self.layers = race.layers or MODELS[race.model].layers
        self.environment = results.environment()
        self.ceilings: dict[str, Any] | None = None
        self.limits: list[dict[str, Any]] = []
        self.rows: list[results.Row] = []
        self.written: list[str] = []

    @property
    def conditions(self) -> results.Row:
        race = self.race
        return {
            **self.environment,
            "model": race.model,
            "layers": self.layers,
            "quant": race.quant,
            "steps": race.steps,
            "warmup": race.warmup,
            "ceilings": self.ceilings,
            "limits": self.limits,
        }

    def prepare(self, batches: list[Batches]) -> None:
        """Makes the weights, and measures the ceilings on CUDA."""
        made = self._work("save", "save", model=self.race.model, layers=self.layers, quant=self.race.quant)
        if "error" in made:
            raise RunError(f"{self.race.model} with {self.layers} layers could not be made: {made['error']}")
        if torch.cuda.is_available():
            constant = [(each.rows, each.length) for each in batches if each.is_constant]
            found = self._work("ceilings", "ceilings", model=self.race.model, batches=constant)
            self.ceilings = None if self._failed("ceilings", found) else found

    def measure(self, batches: Batches) -> None:
        """Everyone at one kind of batch. What is known is written after each: a long race may be cut short."""
        limited = self._limit(batches.rows, batches.length) if batches.is_constant else None
        truth = self._truth(batches)
        before = self.rows
        found: list[results.Row] = []
        for name in self.race.contenders or CONTENDERS:
            row = self._contend(named(name), batches, truth)
            row |= {"limit_seconds": limited, "share_of_limit": _ratio(limited, row.get("seconds"))}
            time = f"{row['seconds'] * 1e3:.2f} ms" if row.get("seconds") else "no time"
            self.console.print(f"{batches} {name}: {row['status']}, {time}", markup=False, highlight=False)
            found = results.ranked([*found, row])
            self.rows = before + found
            with writing(self.race.output):
                self.written = results.write(self.race.output, self.conditions, self.rows)
        kept = f" in {self.race.quant}" if self.race.quant else ""
        title = f"{self.race.model}{kept}, {self.layers} layers, {batches} tokens"
        self.console.print(results.table(found, title))
        for row in found:
            if "profile" in row:
                self.console.print(results.profile_table(row, self._limits_of(batches.rows, batches.length)))
        for line in results.problems(found):
            self.console.print(line, highlight=False, soft_wrap=True)

    def _limits_of(self, rows: int, length: int) -> dict[str, float]:
        """The seconds of each part at the ceilings, if they were measured."""
        return next((each["parts"] for each in self.limits if (each["rows"], each["length"]) == (rows, length)), {})

    def _limit(self, rows: int, length: int) -> float | None:
        """Seconds of a step at the ceilings."""
        if self.ceilings is None:
            return None
        quantised = self.race.quant is not None
        found = limit(MODELS[self.race.model], self.layers, rows, length, self.ceilings, quantised)
        self.limits.append({"rows": rows, "length": length, **found})
        milliseconds, backend = found["seconds"] * 1e3, found["attention_backend"]
        self.console.print(f"{rows}x{length} limit: {milliseconds:.2f} ms, attention by {backend}", highlight=False)
        return found["seconds"]

    def _truth(self, batches: Batches) -> Truth | None:
        found = self._work("truth", f"truth-{batches}", rows=batches.rows, length=batches.length)
        if self._failed("float32 reference", found):
            return None
        path = self.scratch / TRUTH
        return Truth(path, found["loss"], errors(self.scratch / ROUNDED, path), found["eager_loss"])

    def _contend(self, contender: Contender, batches: Batches, truth: Truth | None) -> results.Row:
        gradients = self.scratch / "gradients.safetensors"
        gradients.unlink(missing_ok=True)
        found = self._work(
            "contend",
            f"{contender.name}-{batches}",
            prepare=contender.prepare,
            options=contender.options,
            rows=batches.rows,
            lengths=batches.lengths(),
            steps=self.race.steps,
            warmup=self.race.warmup,
            gradients=str(gradients),
            profile=self.race.profile,
        )
        row = {"contender": contender.name, "batch": str(batches), **batches._asdict(), "extra_bytes": None}
        if "error" in found:
            return row | {"status": "failed", "problem": found["error"]}
        return row | found | judged(contender, gradients, found["loss"], truth)

    def _work(self, role: str, name: str, **arguments: Any) -> dict[str, Any]:
        log = self.race.output.resolve() / LOGS / f"{name}.log"
        return work(role, self.scratch, log, self.race.timeout, **arguments)

    def _failed(self, what: str, found: dict[str, Any]) -> bool:
        if "error" in found:
            self.console.print(f"[red]no {what}:[/] {escape(found['error'])}", highlight=False, soft_wrap=True)
        return "error" in found


def judged(contender: Contender, gradients: Path, loss: float, truth: Truth | None) -> results.Row:
    """What is known of a contender's exactness, and whether it may be ranked."""
    if truth is None:
        return {"status": "unchecked", "problem": "there is no float32 reference to compare with; try fewer --layers"}
    found = errors(gradients, truth.path)
    problem = disagreement(found, loss, truth, contender.ratio)
    worst = found.worst if found.tensors else None
    return {
        "status": "wrong" if problem else results.RANKED,
        "problem": problem,
        "loss_error": relative(loss, truth.loss),
        "eager_loss_error": truth.eager_loss_error,
        "gradient_error": found.step,
        "eager_gradient_error": truth.eager.step,
        "times_eager_error": _ratio(found.step, truth.eager.step),
        "worst_tensor": worst,
        "worst_tensor_error": found.tensors[worst] if worst else None,
        "tensor_errors": found.tensors,
    }


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None


def _check(race: Race) -> list[Batches]:
    """The batches of a race that makes sense."""
    if race.model not in MODELS:
        raise UsageError(f"--model {race.model}: unknown; choose from {', '.join(MODELS)}")
    for name in race.contenders:
        try:
            named(name)
        except ValueError as problem:
            raise UsageError(f"--contenders {name}: {problem}") from None
    if race.quant is not None:
        if race.quant not in FORMATS:
            raise UsageError(f"--quant {race.quant}: unknown; choose from {', '.join(FORMATS)}")
        check_installed(f"--quant {race.quant}")
    least = {"--layers": (race.layers, 1), "--steps": (race.steps, 1), "--warmup": (race.warmup, 0)}
    for option, (number, bound) in least.items():
        if number is not None and number < bound:
            raise UsageError(f"{option} {number}: must be a whole number of at least {bound}")
    if not race.timeout > 0:
        raise UsageError(f"--timeout {race.timeout:g}: must be more than 0 seconds")
    return [_batch(text) for text in race.batches]


def _batch(text: str) -> Batches:
    try:
        return parse(text)
    except ValueError as problem:
        raise UsageError(f"--batch {text}: {problem}") from None
