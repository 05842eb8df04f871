"""About a thousand rules with one mutation each are errors where they are defined, which name the mistake.

A mutation changes one thing in a valid rule: a name in the pattern, an argument of a decorator, a value in `attrs`, a
parameter or the result of a function.
"""

from __future__ import annotations

import inspect
import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from mistakes_in_patterns import MISTAKES
from written_rules import RIGHT, Written

import fastlora


@pytest.mark.parametrize("written", RIGHT, ids=lambda written: written.function.__name__)
def test_unmutated_rules_are_valid(written: Written) -> None:
    assert written.define().name == written.function.__name__


def _where(function: Callable[..., Any]) -> str:
    code = inspect.unwrap(function).__code__
    return f"{code.co_filename}:{code.co_firstlineno}: rule {function.__name__}: "


def _cases(count: int) -> Iterator[tuple[str, Written, str]]:
    """Return this many mutated rules, with about the same number of each kind of mutation."""
    rng = random.Random(0)
    for number in range(count):
        kind = list(MISTAKES)[number % len(MISTAKES)]
        changed: list[tuple[Written, str]] = []
        while not changed:
            changed = list(MISTAKES[kind](rng.choice(RIGHT), rng))
        yield kind, *rng.choice(changed)


def test_every_mutated_rule_is_an_error_at_its_line() -> None:
    seen: Counter[str] = Counter()
    for kind, written, said in _cases(1000):
        try:
            written.define()
        except fastlora.RuleError as error:
            message = str(error)
        else:
            pytest.fail(f"{kind} is no error in {written.function.__name__}; it should say {said!r}")
        assert message.startswith(_where(written.function)), (kind, message)
        assert said in message, (kind, said, message)
        seen[kind] += 1
    assert seen.total() == 1000
    assert seen.keys() == MISTAKES.keys()
    assert min(seen.values()) >= 20
