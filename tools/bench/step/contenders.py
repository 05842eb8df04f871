"""Who takes part. A contender is named here and prepared in its own process, by a function of `preparations`.

`fastlora@9GiB` is fastlora with that memory budget, and `fastlora-without-traces` fastlora without one of the shortcuts
that make calls cheap for the host.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from fastlora.kernels.core import shortcuts

MINE, EAGER = "fastlora", "eager"
WITHOUT = f"{MINE}-without-"
"""Without CUDA graphs as well, which would hide what the host does."""
RATIO = 1.25
"""fastlora's error may be so many times eager's, as everywhere in this project."""
OTHERS_RATIO = 4.0
"""Others may round differently, and their errors are shown; beyond this they compute something else."""


@dataclass(frozen=True)
class Contender:
    """`prepare` is `module:function`, called with a `Place` and the options; it returns a `Prepared`."""

    name: str
    prepare: str
    options: dict[str, Any] = field(default_factory=dict)
    ratio: float = OTHERS_RATIO

    @property
    def mine(self) -> bool:
        return re.split("[-@]", self.name)[0] == MINE


def _here(function: str) -> str:
    return f"fastlora.tools.bench.step.preparations:{function}"


def _mine(name: str, **options: Any) -> Contender:
    return Contender(name, _here("with_fastlora"), options, RATIO)


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(EAGER, _here("eager")),
        _mine(MINE),
        _mine("fastlora@0", memory_budget="0"),
        _mine("fastlora-graphs", mode="reduce-overhead"),
        _mine("fastlora-no-graphs", mode="no-cudagraphs"),
        _mine("fastlora-inductor", lower="inductor"),
        Contender("compile-layers", _here("compiled_layers")),
        Contender("compile", _here("compiled_whole")),
        Contender("liger", _here("with_liger")),
        Contender("liger+compile", _here("with_liger"), {"compiled": True}),
        Contender("unsloth", _here("with_unsloth")),
        Contender("eager-checkpointing", _here("eager"), {"checkpointing": True}),
        _mine("fastlora-checkpointing", checkpointing=True),
        _mine("fastlora-inductor-checkpointing", lower="inductor", checkpointing=True),
        Contender("unsloth-checkpointing", _here("with_unsloth"), {"checkpointing": True}),
    )
}


def named(name: str) -> Contender:
    """The contender of that name.

    Raises:
        ValueError: if there is none.
    """
    if name in CONTENDERS:
        return CONTENDERS[name]
    base, at, budget = name.partition("@")
    if base == MINE and at:
        return _mine(name, memory_budget=budget)
    if name.removeprefix(WITHOUT) in shortcuts.NAMES:
        return _mine(name, mode="no-cudagraphs", without=name.removeprefix(WITHOUT))
    others = f"{MINE}@BUDGET, {WITHOUT}({'|'.join(shortcuts.NAMES)})"
    raise ValueError(f"unknown; choose from {', '.join(CONTENDERS)}, {others}")
