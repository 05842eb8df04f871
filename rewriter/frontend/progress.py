"""A progress line on the terminal while a graph compiles."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

_ERASE = "\r\033[2K"


@contextmanager
def progress(text: str) -> Iterator[None]:
    """Show a line on standard error until the block ends, if that is a terminal."""
    shown = sys.stderr is not None and sys.stderr.isatty()
    if shown:
        print(f"{_ERASE}fastlora: {text} ...", end="", file=sys.stderr, flush=True)
    try:
        yield
    finally:
        if shown:
            print(_ERASE, end="", file=sys.stderr, flush=True)
