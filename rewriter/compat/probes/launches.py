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
def _no_launch_hooks_by_default() -> None:
    expect(launches.has_launch_hooks() is False, "there are no launch hooks by default")


@probe("launch", "direct_launch")
def _launchers_pass_arguments_in_order() -> None:
    """Read the source of the call, as the C function of a launcher has no signature."""
    source = inspect.getsource(CudaLauncher.__call__)
    places = [source.find(name, source.index("self.launch(")) for name in _ORDER]
    expect(places == sorted(places) and min(places) >= 0, f"a launcher passes {', '.join(_ORDER)} in this order")
    names = CudaLauncher.__init__.__code__.co_names
    expect({"global_scratch_size", "profile_scratch_size"} <= set(names), "a launcher has its scratch sizes")
