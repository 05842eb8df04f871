"""Properties of devices that determine which kernels run there."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import NamedTuple

import torch

OLDEST_CAPABILITY = (7, 0)
HALF_DTYPES = (torch.float16, torch.bfloat16)
FLOAT_DTYPES = (torch.float32, *HALF_DTYPES)


@cache
def runs_kernels(device: torch.device) -> bool:
    """Return whether Triton kernels run on a CUDA device; warn if it is too old for them."""
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        needed, found = (".".join(map(str, c)) for c in (OLDEST_CAPABILITY, capability))
        warnings.warn(
            f"fastlora's kernels need compute capability {needed}, and {torch.cuda.get_device_name(device)} has "
            f"{found}: fused ops run their PyTorch implementation there, which is correct but not faster",
            stacklevel=2,
        )
        return False
    return True


class Gpu(NamedTuple):
    """A GPU's compute capability and number of streaming multiprocessors."""

    capability: tuple[int, int]
    processors: int


INTERPRETER = Gpu((9, 0), 4)
"""The GPU that Triton's interpreter emulates. It runs programs one by one, so a few are enough."""
meta_gpu = INTERPRETER
"""The GPU that meta tensors are assumed to be on; see `kernels/triton/precompile.py`."""


@cache
def real(device: torch.device) -> Gpu:
    """Return the properties of a CUDA device."""
    return Gpu(torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count)


def gpu(device: torch.device) -> Gpu:
    """Return the properties of a CUDA device, or of the GPU that a CPU or meta device is assumed to be."""
    return real(device) if device.type == "cuda" else meta_gpu if device.type == "meta" else INTERPRETER


def set_meta_gpu(gpu: Gpu) -> None:
    """Set the GPU that meta tensors are assumed to be on, in the whole process."""
    global meta_gpu
    meta_gpu = gpu


def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a device."""
    return gpu(device).capability


def computes(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether kernels support a dtype: 16-bit and 32-bit floats, bfloat16 only if the GPU has it."""
    return capability(device) >= (8, 0) if dtype is torch.bfloat16 else dtype in FLOAT_DTYPES


def supported(*tensors: torch.Tensor | None) -> bool:
    """Return whether kernels support the dtypes of all tensors."""
    for t in tensors:  # noqa: SIM110  (a generator is slower)
        if t is not None and not computes(t.dtype, t.device):
            return False
    return True


def processors(device: torch.device) -> int:
    """Return the number of streaming multiprocessors of a device."""
    return gpu(device).processors
