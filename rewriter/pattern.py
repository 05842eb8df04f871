"""The pattern language for rule authors, whose modules may move: `from fastlora.pattern import sigmoid, widened`.

`fastlora.match.dsl` documents it. Operations that are spelled later are here as well.
"""

from __future__ import annotations

from typing import Any

from fastlora.match import dsl


def __getattr__(name: str) -> Any:
    return getattr(dsl, name)
