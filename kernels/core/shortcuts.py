"""What makes calls of ops cheap for the host, each of which can be left out to test or measure what it is for.

    plans           a call site keeps what it has found out about a call, for tensors of the same layouts
    traces          what an implementation did on such tensors is recorded, and replayed
    kernels         a launch finds its compiled kernel by a key of its own, not by Triton's
    precompilation  a graph's kernels are compiled side by side before it runs

`fastlora bench step --contenders fastlora,fastlora-without-traces` measures one of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

NAMES = ("plans", "traces", "kernels", "precompilation")
use = SimpleNamespace(**dict.fromkeys(NAMES, True))
"""Whether each is used, in the whole process."""


@contextmanager
def without(*names: str) -> Iterator[None]:
    """Do without these shortcuts, in the whole process.

    Raises:
        ValueError: if there is no such shortcut.
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
