"""fastlora: a compiler pass between a PyTorch model and its execution.

It reads the graphs that TorchDynamo traces, finds LoRA adapters, norms, rotary embeddings, gated MLPs and losses, and
replaces each by a fused op with a hand-derived backward; everything else stays bit-identical. It depends on no model
and changes no global state: rules are in `fastlora.patterns`, ops in `fastlora.kernels`.

Importing this package imports nothing else. Each public name is loaded at its first use (PEP 562), so that
`import fastlora` and `fastlora --help` do not wait for PyTorch's compiler.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastlora.api import compile, disable, explain, report
    from fastlora.checking.agreement import Agreement
    from fastlora.checking.check import check
    from fastlora.errors import FastLoRAError, RuleError, StrictError
    from fastlora.frontend.options import default_rules
    from fastlora.match.rule import fuse, group, rule
    from fastlora.reports.model import Coverage, Miss, Report, Site

    __version__: str

__all__ = [
    "Agreement",
    "Coverage",
    "FastLoRAError",
    "Miss",
    "Report",
    "RuleError",
    "Site",
    "StrictError",
    "check",
    "compile",
    "default_rules",
    "disable",
    "explain",
    "fuse",
    "group",
    "report",
    "rule",
]

_DEFINED_IN = {
    "Agreement": "checking.agreement",
    "Coverage": "reports.model",
    "FastLoRAError": "errors",
    "Miss": "reports.model",
    "Report": "reports.model",
    "RuleError": "errors",
    "Site": "reports.model",
    "StrictError": "errors",
    "check": "checking.check",
    "compile": "api",
    "default_rules": "frontend.options",
    "disable": "api",
    "explain": "api",
    "fuse": "match.rule",
    "group": "match.rule",
    "report": "api",
    "rule": "match.rule",
}


class _Package(ModuleType):
    """Keeps an import of `fastlora.rule`, the module, from hiding `fastlora.rule`, the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _DEFINED_IN or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package

if not TYPE_CHECKING:  # a type checker would take every misspelled name for an `Any`

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            value: Any = import_module("importlib.metadata").version("fastlora-fx")
        elif name in _DEFINED_IN:
            value = getattr(import_module(f"fastlora.{_DEFINED_IN[name]}"), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
