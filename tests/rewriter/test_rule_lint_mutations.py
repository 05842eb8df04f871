"""About a thousand rules with one mutation each are errors where they are defined, which name the mutation.

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
from pattern_mutations import MUTATIONS
from valid_rules import VALID_RULES, RuleSource

import fastlora


@pytest.mark.parametrize("written", VALID_RULES, ids=lambda written: written.function.__name__)
def test_unmutated_rules_are_valid(written: RuleSource) -> None:
    assert written.define().name == written.function.__name__


def _where(function: Callable[..., Any]) -> str:
    code = inspect.unwrap(function).__code__
    return f"{code.co_filename}:{code.co_firstlineno}: rule {function.__name__}: "


def _cases(count: int) -> Iterator[tuple[str, RuleSource, str]]:
    """Return this many mutated rules, with about the same number of each kind of mutation."""
    rng = random.Random(0)
    for number in range(count):
        kind = list(MUTATIONS)[number % len(MUTATIONS)]
        changed: list[tuple[RuleSource, str]] = []
        while not changed:
            changed = list(MUTATIONS[kind](rng.choice(VALID_RULES), rng))
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
    assert seen.keys() == MUTATIONS.keys()
    assert min(seen.values()) >= 20
