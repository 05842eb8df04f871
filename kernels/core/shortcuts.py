"""Optimizations of host overhead, each of which can be disabled for tests and measurements.

    plans           call sites cache how to run a call, by the layouts of its tensors
    traces          the operators and launches of an implementation are recorded, and replayed
    kernels         launches find their compiled kernel by a cheaper key than Triton's
    precompilation  a graph's kernels are compiled in parallel before it runs

`fastlora bench step --contenders fastlora,fastlora-without-traces` measures one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

NAMES = ("plans", "traces", "kernels", "precompilation")
use = SimpleNamespace(**dict.fromkeys(NAMES, True))
"""Whether each is enabled, in the whole process."""


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Disable these optimizations, in the whole process.

    Raises:
        ValueError: for an unknown name.
    """
    for name in names:
        if name not in NAMES:
            raise ValueError(f"without({name!r}): must be one of {', '.join(NAMES)}")
    before = {name: getattr(use, name) for name in names}
    vars(use).update(dict.fromkeys(names, False))
    try:
        yield
    finally:
        vars(use).update(before)
