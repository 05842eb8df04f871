"""How a step stays within a budget of activations: what each call of a region is to do about what it would keep.

Of what a call keeps for its backward, two things can be had elsewhere. All of it can lie on the host in between, which
costs nothing as long as the copies take less time than the forward does. And the widest activations can be made again
in the backward (`kernels/core/recompute.py`), which always costs their products. So as much is moved as is free, then
made again, and only then more is moved than is free. Where all make theirs again, the last calls keep them, as far as
there is room or moving more is free: theirs are read first, when they would be there again anyway.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastlora.errors import FastLoRAError

_UNITS = {"": 1, **{f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)}}
_UNITS |= {"B": 1, **{f"{prefix}iB": 1024**i for i, prefix in enumerate("KMGT", 1)}}


@dataclass(frozen=True)
class Needs:
    """Bytes that a call of a region keeps, those of them that can be made again, and its floating-point operations."""

    kept: int
    spared: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Choice:
    """Whether a call moves what it keeps to the host, and whether it spares what can be made again."""

    moves: bool = False
    spares: bool = False


KEEP, LEAST = Choice(), Choice(moves=True, spares=True)


def left(needs: Needs, choice: Choice) -> int:
    """The bytes that a call keeps on the device."""
    return 0 if choice.moves else needs.kept - needs.spared * choice.spares


def parse(budget: str | int | None) -> int | None:
    """Bytes of a budget such as `"8GiB"`, `"500 MB"` or a number of bytes.

    Raises:
        FastLoRAError: if it is none.
    """
    if budget is None or (isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0):
        return budget
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget) if isinstance(budget, str) else None
    if match is None or match[2] not in _UNITS:
        raise FastLoRAError(
            f"memory_budget={budget!r}: give bytes of activations as a whole number of at least 0, or as text with a "
            "unit, such as '8GiB' or '500MB'"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def choose(calls: Sequence[Needs], budget: int, bytes_per_flop: float) -> list[Choice]:
    """What the calls of a forward do, in their order, so as to keep no more than `budget` bytes if that is possible.

    In the time of a floating-point operation `bytes_per_flop` can be moved. Those that move come first: they have the
    longest time until their backward.
    """
    free = movable = bytes_per_flop * sum(call.flops for call in calls)
    over = sum(call.kept for call in calls) - budget
    choices = [KEEP] * len(calls)
    for i, call in enumerate(calls):
        if over > 0 and free >= call.kept:
            choices[i] = Choice(moves=True)
            over, free = over - call.kept, free - call.kept
    for i, call in enumerate(calls):
        if over > 0 and choices[i] is KEEP and call.spared:
            choices[i] = Choice(spares=True)
            over -= call.spared
    if over <= 0:
        return choices
    over = sum(call.kept - call.spared for call in calls) - budget
    free = movable
    choices = [Choice(spares=call.spared > 0) for call in calls]
    for i, call in enumerate(calls):
        if over > 0:
            choices[i] = LEAST
            over, free = over - (call.kept - call.spared), free - (call.kept - call.spared)
    _keep_last(calls, choices, -over, free)
    return choices


def _keep_last(calls: Sequence[Needs], choices: list[Choice], room: int, free: float) -> None:
    """Has the last calls that would make something again keep it, as far as there is `room` for that, or will be if
    others move what they keep, `free` bytes at most."""
    for last in reversed(range(len(calls))):
        if choices[last] != Choice(spares=True):
            continue
        moving = []
        for i, call in enumerate(calls[:last]):
            size = call.kept - call.spared
            if room < calls[last].spared and not choices[i].moves and size <= free:
                moving.append(i)
                room, free = room + size, free - size
        if room < calls[last].spared:
            return
        room -= calls[last].spared
        choices[last] = KEEP
        for i in moving:
            choices[i] = LEAST
