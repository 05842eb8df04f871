"""The exceptions that users see."""

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
    """Return the end of a message about an invalid name: the closest valid name, and all valid names."""
    names = sorted(valid)
    closest = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {closest[0]!r}? " if closest else ""
    return f"{hint}Known: {', '.join(names) or 'none'}"


def written_at() -> str:
    """Return `file:line` of the code that called into fastlora, which may be a rule that comes with fastlora."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_inside(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _is_inside(module: str) -> bool:
    return module.startswith("fastlora.") and not module.startswith("fastlora.patterns")
