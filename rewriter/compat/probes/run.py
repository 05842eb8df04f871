"""Run the probes of all private APIs."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch

from fastlora.compat.probes.probe import Probe

AREAS = (
    "autograd",
    "calls",
    "dispatch",
    "dynamo",
    "modules",
    "tracing",
    *(["launches"] if find_spec("triton") is not None else []),
)
"""The modules of `fastlora.compat`, each with a module of probes of the same name. `launches` requires Triton."""


def probes(area: str) -> dict[str, Probe]:
    """Return the probes of one module of `fastlora.compat`, by the names that they cover."""
    table: dict[str, Probe] = import_module(f"fastlora.compat.probes.{area}").PROBES
    return table


def failure(probe: Probe) -> str | None:
    """Run a probe; return what is wrong, or None if the API behaves as expected."""
    try:
        with torch.random.fork_rng(devices=[]):
            probe()
    except Exception as problem:  # a private API that has changed may raise anything
        return f"{type(problem).__name__}: {problem}".partition("\n")[0]
    return None


def failures() -> list[str]:
    """Run all probes; return a line for each private API that does not behave as expected."""
    found: list[str] = []
    for area in AREAS:
        try:
            table = probes(area)
        except Exception as problem:  # an alias of a missing API
            found.append(f"fastlora.compat.{area} cannot be imported: {type(problem).__name__}: {problem}")
            continue
        for probe in dict.fromkeys(table.values()):
            if (wrong := failure(probe)) is not None:
                names = ", ".join(name for name, its in table.items() if its is probe)
                found.append(f"fastlora.compat.{area} ({names}): {wrong}")
    return found
