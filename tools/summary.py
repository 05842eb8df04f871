"""The summary of a run as JSON."""

import json
import math
import os
import platform
import resource
import sys
from collections import Counter
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from fastlora.tools.comparison import Comparison
from fastlora.tools.encoding import Encoded
from fastlora.tools.output import COMMAND
from fastlora.tools.settings import Settings
from fastlora.tools.training import Run

PACKAGES = ("fastlora-fx", "torch", "triton", "transformers", "peft", "accelerate", "datasets")


def summarize(
    settings: Settings, encoded: Encoded, fused: Run, eager: Run | None, comparison: Comparison | None, report: Any
) -> dict[str, Any]:
    """Return all measurements of a run, with its settings, versions and hardware."""
    return {
        "command": COMMAND,
        "settings": {**asdict(settings), "learning_rate": settings.effective_learning_rate},
        "data": {"examples": encoded.examples, "cut": encoded.cut, "dropped": encoded.dropped},
        "fastlora": _run(fused),
        "eager": _run(eager) if eager else None,
        "comparison": _comparison(comparison) if comparison else None,
        "coverage": {name: {"seen": item.seen, "fused": item.fused} for name, item in report.coverage.items()},
        "fused": _fused(report),
        "missed": [{"op": miss.op, "reason": miss.reason, "count": miss.count} for miss in report.missed],
        "graphs": report.graphs,
        "graph_breaks": list(report.breaks),
        "notes": list(report.notes),
        "peak_process_bytes": peak_process_bytes(),
        "versions": {"python": platform.python_version(), **versions()},
        "hardware": hardware(),
    }


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    path.write_text(json.dumps(to_json_value(summary), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def peak_process_bytes() -> int:
    """Return the peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # Triton is not available on all platforms
            continue
    return found


def hardware() -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else platform.machine(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }


def _run(run: Run) -> dict[str, Any]:
    return {
        "losses": run.losses,
        "first_step_seconds": run.seconds[0],
        "seconds": run.seconds,
        "tokens": sum(run.tokens),
        "tokens_per_second_after_first_step": run.tokens_per_second,
        "peak_gpu_bytes": run.peak_gpu_bytes,
    }


def _fused(report: Any) -> dict[str, int]:
    """Return how often the model uses each fused op."""
    uses: Counter[str] = Counter()
    for site in report.fused:
        uses[site.op] += site.count
    return dict(uses)


def _comparison(comparison: Comparison) -> dict[str, Any]:
    return {
        "largest_relative_difference": comparison.largest,
        "at_step": comparison.largest_step,
        "bound": comparison.bound,
        "within_bound": comparison.within_bound,
    }


def to_json_value(value: Any) -> Any:
    """Convert a value for JSON: paths become strings, and nan and infinities None."""
    if isinstance(value, dict):
        return {key: to_json_value(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
