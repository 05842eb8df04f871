"""How a step stays within a budget of activations: which calls of regions offload them, and which recompute some.

What a call saves for its backward need not stay on the GPU. All of it can be offloaded to the host, which costs nothing
as long as the copies take less time than the forward does. And the widest activations can be recomputed in the backward
(`kernels/core/recompute.py`), which always costs their matrix products. So as much is offloaded as is free, then
activations are recomputed, and only then more is offloaded. Where all calls recompute, the last ones keep their
activations as far as there is room, or offloading more is free: theirs are read first in the backward.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from fastlora.errors import FastLoRAError

_UNITS = {"": 1, **{f"{prefix}B": 1000**i for i, prefix in enumerate("KMGT", 1)}}
_UNITS |= {"B": 1, **{f"{prefix}iB": 1024**i for i, prefix in enumerate("KMGT", 1)}}


@dataclass(frozen=True)
class Activations:
    """What a call of a region saves for its backward.

    Attributes:
        saved: bytes of all of it.
        recomputable: bytes of what can be recomputed.
        flops: floating-point operations of the forward.
    """

    saved: int
    recomputable: int = 0
    flops: float = 0.0


@dataclass(frozen=True)
class Decision:
    """Whether a call offloads what it saves, and whether it recomputes what can be recomputed."""

    offload: bool = False
    recompute: bool = False


KEEP, KEEP_LEAST = Decision(), Decision(offload=True, recompute=True)


def bytes_kept(call: Activations, decision: Decision) -> int:
    """Return the bytes that a call keeps on the device."""
    return 0 if decision.offload else call.saved - call.recomputable * decision.recompute


def parse_bytes(budget: str | int | None) -> int | None:
    """Return the bytes of a budget such as `"8GiB"`, `"500 MB"` or a number of bytes.

    Raises:
        FastLoRAError: if it is not one.
    """
    if budget is None or (isinstance(budget, int) and not isinstance(budget, bool) and budget >= 0):
        return budget
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", budget) if isinstance(budget, str) else None
    if match is None or match[2] not in _UNITS:
        raise FastLoRAError(
            "memory_budget must be a number of bytes, at least 0, or text with a unit such as '8GiB' or '500MB'; got "
            f"{budget!r}"
        )
    return int(float(match[1]) * _UNITS[match[2]])


def plan(calls: Sequence[Activations], budget: int, bytes_per_flop: float) -> list[Decision]:
    """Decide for each call of a forward, so that they keep no more than `budget` bytes if that is possible.

    Args:
        calls: the calls, in order.
        budget: bytes that may stay on the device.
        bytes_per_flop: bytes that can be copied to the host in the time of a floating-point operation. Earlier calls
            offload first, as they have the longest time until their backward.
    """
    free = free_in_all = bytes_per_flop * sum(call.flops for call in calls)
    over = sum(call.saved for call in calls) - budget
    decisions = [KEEP] * len(calls)
    for i, call in enumerate(calls):
        if over > 0 and free >= call.saved:
            decisions[i] = Decision(offload=True)
            over, free = over - call.saved, free - call.saved
    for i, call in enumerate(calls):
        if over > 0 and decisions[i] is KEEP and call.recomputable:
            decisions[i] = Decision(recompute=True)
            over -= call.recomputable
    if over <= 0:
        return decisions
    over = sum(call.saved - call.recomputable for call in calls) - budget
    free = free_in_all
    decisions = [Decision(recompute=call.recomputable > 0) for call in calls]
    for i, call in enumerate(calls):
        if over > 0:
            decisions[i] = KEEP_LEAST
            over, free = over - (call.saved - call.recomputable), free - (call.saved - call.recomputable)
    _keep_last(calls, decisions, -over, free)
    return decisions


def _keep_last(calls: Sequence[Activations], decisions: list[Decision], room: int, free: float) -> None:
    """Have the last calls that would recompute keep their activations instead.

    Args:
        calls, decisions: the calls and what was decided, which is changed.
        room: bytes that are left of the budget.
        free: bytes that earlier calls may still offload to make room.
    """
    for last in reversed(range(len(calls))):
        if decisions[last] != Decision(recompute=True):
            continue
        offloading = []
        for i, call in enumerate(calls[:last]):
            size = call.saved - call.recomputable
            if room < calls[last].recomputable and not decisions[i].offload and size <= free:
                offloading.append(i)
                room, free = room + size, free - size
        if room < calls[last].recomputable:
            return
        room -= calls[last].recomputable
        decisions[last] = KEEP
        for i in offloading:
            decisions[i] = KEEP_LEAST
