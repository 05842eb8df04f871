"""What runs in a process of its own: `python -m fastlora.tools.bench.step.worker SPEC.json`.

The specification names a role, its arguments, and the file for the result, which is JSON: what the role returns, or
`{"error": ...}`. Libraries are imported inside the roles, as a contender may want to be the first to import them.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fastlora.tools.problems import one_line


def save(folder: Path, device: torch.device, model: str, layers: int, quant: str | None) -> dict[str, Any]:
    """Draws and saves the weights that all share."""
    from fastlora.tools.bench.step import weights

    weights.save(model, layers, folder, device, quant)
    return {}


def truth(folder: Path, device: torch.device, rows: int, length: int) -> dict[str, Any]:
    """Writes the gradients that contenders are compared with."""
    from fastlora.tools.bench.step.truth import write_truth

    return write_truth(folder, rows, length, device)


def ceilings(folder: Path, device: torch.device, model: str, batches: list[list[int]]) -> dict[str, Any]:
    """Measures what the limit is computed from."""
    from fastlora.tools.bench.step.ceilings import measured
    from fastlora.tools.bench.step.models import MODELS

    return {**measured(MODELS[model].shape, [(rows, length) for rows, length in batches]), "batches": batches}


def contend(
    folder: Path,
    device: torch.device,
    prepare: str,
    options: dict[str, Any],
    rows: int,
    lengths: list[int],
    steps: int,
    warmup: int,
    gradients: str,
    profile: bool,
) -> dict[str, Any]:
    """Prepares a contender and measures its steps."""
    from fastlora.tools.bench.step import weights
    from fastlora.tools.bench.step.measurement import Trainer, measure
    from fastlora.tools.bench.step.preparations import Place
    from fastlora.tools.bench.step.profile import time_by_work

    module, _, function = prepare.partition(":")
    started = time.perf_counter()
    prepared = getattr(import_module(module), function)(Place(folder, device, max(lengths)), **options)
    seconds = time.perf_counter() - started
    vocabulary = prepared.model.config.vocab_size
    trainer = Trainer(prepared.model, [weights.batch(vocabulary, rows, each, device) for each in lengths], device)
    measured = measure(trainer, steps, warmup, Path(gradients))
    if profile and device.type == "cuda":
        measured["profile"] = time_by_work(trainer)
    return measured | {"prepare_seconds": seconds, "described": prepared.describe()}


ROLES = {role.__name__: role for role in (save, truth, ceilings, contend)}


def main(path: Path) -> None:
    """Plays the role that a specification names. A failure is a result too, and its traceback goes to the log."""
    spec = json.loads(path.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = ROLES[spec["role"]](Path(spec["folder"]), device, **spec["arguments"])
    except Exception as problem:  # whatever a library raises at a shape is a finding
        traceback.print_exc()
        found = {"error": f"{type(problem).__name__}: {one_line(problem)}"}
    Path(spec["result"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
