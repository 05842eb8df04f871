"""Compiles the kernels that calls of ops are going to launch, before the first of them, side by side.

The ops run on tensors without memory, forward and backward, for the GPU at hand: which implementation serves, which
kernels it launches and with which options depends on shapes, strides and dtypes alone. `host/precompile.py` compiles.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastlora.kernels.core import devices, implementations
from fastlora.kernels.core.execution import Call, run_on_meta
from fastlora.kernels.triton.host import precompile


def compile_kernels(calls: Iterable[Call], device: torch.device) -> None:
    """Compile what these calls launch on a GPU.

    Raises:
        Exception: whatever the compiler raises. What was not compiled is compiled when it is launched.
    """
    devices.take_for(devices.real(device))
    with implementations.for_precompilation(), precompile.recorded() as launches:
        for call in calls:
            run_on_meta(call)
    precompile.compile_all(launches, device)
