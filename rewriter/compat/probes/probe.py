"""Probes: functions that use a private API and call `expect` on the results."""

from __future__ import annotations

from collections.abc import Callable

Probe = Callable[[], None]


class ChangedError(Exception):
    """A private API does not behave as fastlora expects."""


def expect(condition: object, meaning: str) -> None:
    """Raise `ChangedError` with the expected `meaning`, unless the condition holds."""
    if not condition:
        raise ChangedError(f"expected that {meaning}")


def collector() -> tuple[dict[str, Probe], Callable[..., Callable[[Probe], Probe]]]:
    """Return an empty table of probes, and a decorator that adds a probe to it under the names that it covers."""
    table: dict[str, Probe] = {}

    def probe(*names: str) -> Callable[[Probe], Probe]:
        def add(function: Probe) -> Probe:
            table.update(dict.fromkeys(names, function))
            return function

        return add

    return table, probe
