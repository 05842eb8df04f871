"""The pattern language, by the name that rule authors import: `from fastlora.pattern import sigmoid, widened`.

`fastlora.match.dsl`, which may move, documents it. Operations that `spell` adds are attributes of this module as well.
"""

from __future__ import annotations

from typing import Any

from fastlora.match import dsl


def __getattr__(name: str) -> Any:
    return getattr(dsl, name)
