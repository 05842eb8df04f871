"""Compiles the kernels of upcoming calls of ops in parallel, before the first call.

The ops run forward and backward on meta tensors: which implementation is chosen, which kernels it launches and with
which options depends only on the GPU and on shapes, strides and dtypes. `host/precompile.py` compiles.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fastlora.kernels.core import devices, implementations
from fastlora.kernels.core.execution import Call, run_on_meta
from fastlora.kernels.triton.host import precompile


def compile_kernels(calls: Iterable[Call], device: torch.device) -> None:
    """Compile the kernels that these calls launch on a GPU.

    Raises:
        Exception: what the compiler raises. Kernels that were not compiled here are compiled when they are launched.
    """
    devices.set_meta_gpu(devices.real(device))
    with implementations.for_precompilation(), precompile.recorded() as launches:
        for call in calls:
            run_on_meta(call)
    precompile.compile_all(launches, device)
