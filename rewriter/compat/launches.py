"""Launches of Triton's kernels, in triton 3.6. Only what runs kernels imports this."""

from __future__ import annotations

from typing import Any

from triton import knobs

__all__ = ["direct_launch", "has_launch_hooks", "launch"]


def has_launch_hooks() -> bool:
    """Return whether something listens to launches, such as Triton's profiler."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def launch(kernel: Any, grid: tuple[int, int, int], stream: int, *args: Any) -> None:
    """Launch a compiled kernel, without hooks, with all of its arguments in order."""
    kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *args)


def direct_launch(kernel: Any, grid: tuple[int, int, int], stream: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Return the C function behind a kernel's launcher, and what it takes before the kernel's own arguments.

    None for a kernel whose launcher allocates scratch memory.
    """
    launcher = kernel.run
    if any(getattr(launcher, name, 1) for name in ("global_scratch_size", "profile_scratch_size")):
        return None
    options = (launcher.launch_cooperative_grid, launcher.launch_pdl)
    return launcher.launch, (*grid, stream, kernel.function, *options, None, None, kernel.packed_metadata, *(None,) * 3)
