"""The batches of a race: sequences of one length, or of lengths that change from batch to batch."""

from __future__ import annotations

import random
import re
from typing import NamedTuple

COUNT = 16
"""Batches of changing lengths, which are trained on in turn."""
_FORM = re.compile(r"([1-9]\d*)x([1-9]\d*)(?:-([1-9]\d*))?")


class Batches(NamedTuple):
    """Sequences in a batch, tokens in the longest of them, and in the shortest batch that there is."""

    rows: int
    length: int
    shortest: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.length}" if self.is_constant else f"{self.rows}x{self.shortest}-{self.length}"

    @property
    def is_constant(self) -> bool:
        return self.shortest == self.length

    def lengths(self) -> list[int]:
        """The length of each batch, the longest first; the others are drawn evenly, always the same."""
        if self.is_constant:
            return [self.length]
        drawn = random.Random(0)
        return [self.length, *(drawn.randint(self.shortest, self.length) for _ in range(COUNT - 1))]


def parse(text: str) -> Batches:
    """Read `4x2048`, or `4x128-1024` for lengths between these.

    Raises:
        ValueError: if it is neither.
    """
    match = _FORM.fullmatch(text)
    if match is not None:
        rows, first, last = int(match[1]), int(match[2]), int(match[3] or match[2])
        if 2 <= first <= last:
            return Batches(rows, last, first)
    raise ValueError(
        "must be sequences x tokens in each, at least 2 of them, such as 4x2048; or 4x128-1024 for changing lengths"
    )
