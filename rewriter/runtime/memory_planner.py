"""Planning a step within a budget of activations: which calls of regions offload them, and which recompute some.

What a call saves for its backward need not stay on the GPU. All of it can be offloaded to the host, which is free as
long as the copies take less time than the forward. The widest activations can also be recomputed in the backward
(`kernels/core/recompute.py`), which always costs their matrix products. So the plan first offloads as much as is free,
then recomputes, and only then offloads more. If all calls would recompute, the last ones keep their activations as far
as the budget allows or more offloading is free, because the backward reads theirs first.
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
    """The activations that a call of a region saves for its backward.

    Attributes:
        saved: their bytes.
        recomputable: the bytes of those that can be recomputed.
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
        FastLoRAError: if `budget` is neither a size nor None.
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
    copies_in_forward = bytes_per_flop * sum(call.flops for call in calls)
    excess, free_copies = sum(call.saved for call in calls) - budget, copies_in_forward
    decisions = [KEEP] * len(calls)
    for i, call in enumerate(calls):
        if excess > 0 and free_copies >= call.saved:
            decisions[i] = Decision(offload=True)
            excess, free_copies = excess - call.saved, free_copies - call.saved
    for i, call in enumerate(calls):
        if excess > 0 and decisions[i] is KEEP and call.recomputable:
            decisions[i] = Decision(recompute=True)
            excess -= call.recomputable
    if excess <= 0:
        return decisions
    excess, free_copies = sum(call.saved - call.recomputable for call in calls) - budget, copies_in_forward
    decisions = [Decision(recompute=call.recomputable > 0) for call in calls]
    for i, call in enumerate(calls):
        if excess > 0:
            decisions[i] = KEEP_LEAST
            size = call.saved - call.recomputable
            excess, free_copies = excess - size, free_copies - size
    _keep_last(calls, decisions, -excess, free_copies)
    return decisions


def _keep_last(calls: Sequence[Activations], decisions: list[Decision], headroom: int, free_copies: float) -> None:
    """Change the decisions for the last calls that would recompute: keep their activations as far as possible.

    Args:
        calls, decisions: the calls and the decisions for them, which are changed in place.
        headroom: bytes that are left of the budget.
        free_copies: bytes that earlier calls can still offload without extra time.
    """
    for last in reversed(range(len(calls))):
        if decisions[last] != Decision(recompute=True):
            continue
        offloading = []
        for i, call in enumerate(calls[:last]):
            size = call.saved - call.recomputable
            if headroom < calls[last].recomputable and not decisions[i].offload and size <= free_copies:
                offloading.append(i)
                headroom, free_copies = headroom + size, free_copies - size
        if headroom < calls[last].recomputable:
            return
        headroom -= calls[last].recomputable
        decisions[last] = KEEP
        for i in offloading:
            decisions[i] = KEEP_LEAST
