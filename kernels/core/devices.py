"""What a device is, as far as kernels are chosen by it: whether they run there, and in which dtypes."""

from __future__ import annotations

import importlib.util
import warnings
from functools import cache
from typing import NamedTuple

import torch

OLDEST_CAPABILITY = (7, 0)
HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)


@cache
def runs_kernels(device: torch.device) -> bool:
    """Whether Triton kernels run on the device; warns where a GPU is too old for them."""
    if torch.version.cuda is None or importlib.util.find_spec("triton") is None:
        return False
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        needed, found = (".".join(map(str, c)) for c in (OLDEST_CAPABILITY, capability))
        warnings.warn(
            f"fastlora's kernels need compute capability {needed}, and {torch.cuda.get_device_name(device)} has "
            f"{found}: fused ops run on their PyTorch form there, which is right but not faster",
            stacklevel=2,
        )
        return False
    return True


class Gpu(NamedTuple):
    """What kernels are chosen by: compute capability, and the number of streaming multiprocessors."""

    capability: tuple[int, int]
    processors: int


INTERPRETER = Gpu((9, 0), 4)
"""Programs run one by one there, so a few are enough."""
stand_in = INTERPRETER
"""The GPU that tensors without memory are taken to be on; see `rehearsal.py`."""


@cache
def real(device: torch.device) -> Gpu:
    """What a CUDA device is."""
    return Gpu(torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count)


def gpu(device: torch.device) -> Gpu:
    """What a device is, or stands for."""
    return real(device) if device.type == "cuda" else stand_in if device.type == "meta" else INTERPRETER


def take_for(gpu: Gpu) -> None:
    """Has tensors without memory be on such a GPU from now on."""
    global stand_in
    stand_in = gpu


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a device."""
    return gpu(device).capability


def computes(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels compute in this dtype: floats of 16 and 32 bits, bfloat16 only where the GPU has it."""
    return capability(device) >= (8, 0) if dtype is torch.bfloat16 else dtype in FLOATS


def supported(*tensors: torch.Tensor | None) -> bool:
    """Whether kernels can load and store these."""
    for t in tensors:  # noqa: SIM110  (a generator takes longer)
        if t is not None and not computes(t.dtype, t.device):
            return False
    return True


def processors(device: torch.device) -> int:
    """The streaming multiprocessors of a device."""
    return gpu(device).processors
