"""The worker process: `python -m fastlora.tools.bench.step.worker SPEC.json`.

The JSON file has the name of a role, which is a function of this module, its arguments, and the file for the result.
The result is the role's return value as JSON, or `{"error": message}`. Imports are inside the roles, because a
contender may have to be imported before other libraries.
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

from fastlora.tools.errors import one_line


def save_weights(folder: Path, device: torch.device, model: str, layers: int, quant: str | None) -> dict[str, Any]:
    """Save the weights that all contenders share."""
    from fastlora.tools.bench.step import weights

    weights.save(model, layers, folder, device, quant)
    return {}


def reference(folder: Path, device: torch.device, rows: int, length: int) -> dict[str, Any]:
    """Write the gradients that contenders are compared with."""
    from fastlora.tools.bench.step.reference import write_reference

    return write_reference(folder, rows, length, device)


def ceilings(folder: Path, device: torch.device, model: str, batches: list[list[int]]) -> dict[str, Any]:
    """Measure the peak rates."""
    from fastlora.tools.bench.step.ceilings import measure_ceilings
    from fastlora.tools.bench.step.models import MODELS

    measured = measure_ceilings(MODELS[model].shape, [(rows, length) for rows, length in batches])
    return {**measured, "batches": batches}


def run_contender(
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
    """Prepare a contender and measure its steps."""
    from fastlora.tools.bench.step import weights
    from fastlora.tools.bench.step.measurement import Trainer, measure
    from fastlora.tools.bench.step.preparations import Workspace
    from fastlora.tools.bench.step.profile import time_by_work

    module, _, function = prepare.partition(":")
    started = time.perf_counter()
    prepared = getattr(import_module(module), function)(Workspace(folder, device, max(lengths)), **options)
    seconds = time.perf_counter() - started
    vocabulary = prepared.model.config.vocab_size
    trainer = Trainer(prepared.model, [weights.make_batch(vocabulary, rows, each, device) for each in lengths], device)
    measured = measure(trainer, steps, warmup, Path(gradients))
    if profile and device.type == "cuda":
        measured["profile"] = time_by_work(trainer)
    return measured | {"prepare_seconds": seconds, "described": prepared.describe()}


ROLES = {role.__name__: role for role in (save_weights, reference, ceilings, run_contender)}


def main(path: Path) -> None:
    """Run the role of a specification. An exception becomes the result, and its traceback goes to the log."""
    spec = json.loads(path.read_text())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        result = ROLES[spec["role"]](Path(spec["folder"]), device, **spec["arguments"])
    except Exception as problem:  # libraries raise anything for shapes that they do not support
        traceback.print_exc()
        result = {"error": f"{type(problem).__name__}: {one_line(problem)}"}
    Path(spec["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
