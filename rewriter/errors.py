"""Errors that users see; each says what to do."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable


class FastLoRAError(Exception):
    """Base of every error that fastlora raises on purpose."""


class RuleError(FastLoRAError):
    """A rewrite rule is malformed; raised where the rule is defined, with its source line."""


class StrictError(FastLoRAError):
    """`strict=True`, and a candidate for fusion is not fused."""


def suggestion(name: object, valid: Iterable[str]) -> str:
    """The end of a message about a name that is none of the valid ones: the closest of them, and all."""
    names = sorted(valid)
    closest = difflib.get_close_matches(str(name), names, n=1)
    meant = f"did you mean {closest[0]!r}? " if closest else ""
    return f"{meant}Known: {', '.join(names) or 'none'}"


def written_at() -> str:
    """`file:line` of the code that called into fastlora; the rules that come with it are such code as well."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _is_inside(module: str) -> bool:
    return module.startswith("fastlora.") and not module.startswith("fastlora.patterns")
