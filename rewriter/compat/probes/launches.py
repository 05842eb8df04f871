"""Probes of `fastlora.compat.launches`."""

from __future__ import annotations

import inspect

from triton.backends.nvidia.driver import CudaLauncher

from fastlora.compat import launches
from fastlora.compat.probes.probe import collector, expect

PROBES, probe = collector()
_ORDER = (
    "gridX", "gridY", "gridZ", "stream", "function", "launch_cooperative_grid", "launch_pdl", "global_scratch",
    "profile_scratch", "*args",
)  # fmt: skip


@probe("has_launch_hooks")
def _nothing_listens() -> None:
    expect(launches.has_launch_hooks() is False, "nothing listens to launches by default")


@probe("launch", "direct_launch")
def _launchers_hand_on_what_they_take() -> None:
    """The C function behind a launcher has no signature, so the call of it is read."""
    source = inspect.getsource(CudaLauncher.__call__)
    places = [source.find(name, source.index("self.launch(")) for name in _ORDER]
    expect(places == sorted(places) and min(places) >= 0, f"a launcher hands on {', '.join(_ORDER)}")
    names = CudaLauncher.__init__.__code__.co_names
    expect({"global_scratch_size", "profile_scratch_size"} <= set(names), "a launcher knows its scratch sizes")
