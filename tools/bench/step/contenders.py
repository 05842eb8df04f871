"""The contenders by name. Each is prepared in its own process, by a function of `preparations`.

`fastlora@9GiB` is fastlora with that memory budget. `fastlora-without-traces` is fastlora without one of the shortcuts
that save host time, and without CUDA graphs, which would hide the host time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from fastlora.kernels.core import shortcuts

FASTLORA, EAGER = "fastlora", "eager"
WITHOUT = f"{FASTLORA}-without-"
RATIO = 1.25
"""Largest allowed error of fastlora over eager's, as everywhere in this project."""
OTHERS_RATIO = 4.0
"""The same for others, which may round differently; with larger errors they compute something else."""


@dataclass(frozen=True)
class Contender:
    """A way to run the training step.

    Attributes:
        prepare: `module:function`, called with a `Workspace` and the options, which returns a `Prepared`.
        ratio: largest allowed error over eager's.
    """

    name: str
    prepare: str
    options: dict[str, Any] = field(default_factory=dict)
    ratio: float = OTHERS_RATIO

    @property
    def is_fastlora(self) -> bool:
        return re.split("[-@]", self.name)[0] == FASTLORA


def _preparation(function: str) -> str:
    return f"fastlora.tools.bench.step.preparations:{function}"


def _fastlora(name: str, **options: Any) -> Contender:
    return Contender(name, _preparation("with_fastlora"), options, RATIO)


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender(EAGER, _preparation("eager")),
        _fastlora(FASTLORA),
        _fastlora("fastlora@0", memory_budget="0"),
        _fastlora("fastlora-graphs", mode="reduce-overhead"),
        _fastlora("fastlora-no-graphs", mode="no-cudagraphs"),
        _fastlora("fastlora-inductor", lower="inductor"),
        Contender("compile-layers", _preparation("compiled_layers")),
        Contender("compile", _preparation("compiled_whole")),
        Contender("liger", _preparation("with_liger")),
        Contender("liger+compile", _preparation("with_liger"), {"compiled": True}),
        Contender("unsloth", _preparation("with_unsloth")),
        Contender("eager-checkpointing", _preparation("eager"), {"checkpointing": True}),
        _fastlora("fastlora-checkpointing", checkpointing=True),
        _fastlora("fastlora-inductor-checkpointing", lower="inductor", checkpointing=True),
        Contender("unsloth-checkpointing", _preparation("with_unsloth"), {"checkpointing": True}),
    )
}


def get_contender(name: str) -> Contender:
    """Return the contender of a name.

    Raises:
        ValueError: if the name is unknown.
    """
    if name in CONTENDERS:
        return CONTENDERS[name]
    base, at, budget = name.partition("@")
    if base == FASTLORA and at:
        return _fastlora(name, memory_budget=budget)
    if name.removeprefix(WITHOUT) in shortcuts.NAMES:
        return _fastlora(name, mode="no-cudagraphs", without=name.removeprefix(WITHOUT))
    others = f"{FASTLORA}@BUDGET, {WITHOUT}({'|'.join(shortcuts.NAMES)})"
    raise ValueError(f"unknown; choose from {', '.join(CONTENDERS)}, {others}")
