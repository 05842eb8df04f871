"""What a probe is: a function that uses one private API and calls `expect` on what it finds."""

from __future__ import annotations

from collections.abc import Callable

Probe = Callable[[], None]


class ChangedError(Exception):
    """A private API no longer means what fastlora takes it to mean."""


def expect(condition: object, meaning: str) -> None:
    """Raise `ChangedError` with what was expected, unless the condition holds."""
    if not condition:
        raise ChangedError(f"expected that {meaning}")


def collector() -> tuple[dict[str, Probe], Callable[..., Callable[[Probe], Probe]]]:
    """Return an empty table of probes and the decorator that puts a probe into it, under the names it is about."""
    table: dict[str, Probe] = {}

    def probe(*names: str) -> Callable[[Probe], Probe]:
        def enter(function: Probe) -> Probe:
            table.update(dict.fromkeys(names, function))
            return function

        return enter

    return table, probe
