"""Asserting on the errors of rules that are invalid where they are defined."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import fastlora
from fastlora.match.rule import dtype_of

GLU: dict[str, Any] = {"activation": "silu", "out_dtype": dtype_of()}


def assert_rule_error(define: Callable[[], None], message: str) -> None:
    """Assert that `define` raises an error with `message`, and with the file and line of the rule `bad` in it."""
    with pytest.raises(fastlora.RuleError, match=re.escape(message)) as error:
        define()
    path, line = re.match(r"(.*?):(\d+): rule bad: ", str(error.value)).groups()  # type: ignore[union-attr]
    lines, start = inspect.getsourcelines(define)
    assert path == inspect.getsourcefile(define)
    assert start <= int(line) < start + len(lines)
