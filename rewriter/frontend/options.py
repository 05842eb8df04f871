"""The options of `fastlora.compile`, and the default rules."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points

from fastlora.errors import FastLoRAError
from fastlora.match.rule import AnyRule
from fastlora.match.rulebook import rules_of

LOWERINGS = ("auto", "eager", "inductor")
MODES = ("default", "reduce-overhead", "no-cudagraphs", "max-autotune")


@dataclass(frozen=True)
class Options:
    """How to compile; see `fastlora.compile`.

    Attributes:
        memory_budget: in bytes; None for no limit.
        dry: trace and match, but compute nothing, as `fastlora.explain` does.
    """

    lower: str = "auto"
    mode: str = "default"
    strict: bool = False
    verify: bool | str = False
    defer_logits: bool = True
    memory_budget: int | None = None
    dry: bool = False

    def __post_init__(self) -> None:
        _check_choice("lower", self.lower, LOWERINGS)
        _check_choice("mode", self.mode, MODES)
        if not isinstance(self.verify, bool) and self.verify != "first-step":
            raise FastLoRAError(f"verify must be True, False or 'first-step'; got {self.verify!r}")
        for name in ("strict", "defer_logits"):
            if not isinstance(value := getattr(self, name), bool):
                raise FastLoRAError(f"{name} must be True or False; got {value!r}")
        if self.mode == "max-autotune" and self.lower == "eager":
            raise FastLoRAError("mode='max-autotune' is a mode of Inductor: use lower='inductor', or mode='default'")

    @property
    def lowering(self) -> str:
        """`eager` or `inductor`. `auto` means `eager`, as fused ops do most of the work, unless `mode` is one of
        Inductor's."""
        if self.lower == "auto":
            return "inductor" if self.mode == "max-autotune" else "eager"
        return self.lower


def default_rules() -> list[AnyRule]:
    """Return the rules that come with fastlora, then those of installed packages.

    A package adds rules by the entry-point group `fastlora.patterns`; each entry point is a list of rules, or a module
    with such a list under the name `RULES`.
    """
    from fastlora.patterns import RULES

    found: list[AnyRule] = list(RULES)
    for entry in entry_points(group="fastlora.patterns"):
        found += rules_of(entry)
    return found


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise FastLoRAError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
