"""Launches of Triton kernels, in triton 3.6. Import this only where kernels run."""

from __future__ import annotations

from typing import Any

from triton import knobs

__all__ = ["direct_launch", "has_launch_hooks", "launch"]


def has_launch_hooks() -> bool:
    """Return whether launch hooks are registered, such as those of Triton's profiler."""
    enter_hook, exit_hook = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter_hook, "calls", enter_hook) or getattr(exit_hook, "calls", exit_hook))


def launch(kernel: Any, grid: tuple[int, int, int], stream: int, *args: Any) -> None:
    """Launch a compiled kernel with all its arguments, in order, without calling hooks."""
    kernel.run(*grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *args)


def direct_launch(kernel: Any, grid: tuple[int, int, int], stream: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """Return the C function of a kernel's launcher and its leading arguments, which precede those of the kernel.

    Return None for a kernel whose launcher allocates scratch memory.
    """
    launcher = kernel.run
    if any(getattr(launcher, name, 1) for name in ("global_scratch_size", "profile_scratch_size")):
        return None
    options = (launcher.launch_cooperative_grid, launcher.launch_pdl)
    return launcher.launch, (*grid, stream, kernel.function, *options, None, None, kernel.packed_metadata, *(None,) * 3)
