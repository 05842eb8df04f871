"""Compiles the kernels that calls of ops are going to launch, before the first of them, side by side.

The ops are run on tensors without memory, forward and backward, for the GPU at hand: which form serves, which kernels
it launches and with which options depends on shapes, strides and dtypes alone. See `gpu/ahead.py` for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from fastlora.kernels import forms
from fastlora.kernels.op import SemanticOp


class Call(NamedTuple):
    """An op with its arguments in the schema's order, whose tensors have no memory, and the gradients it wants."""

    op: SemanticOp
    values: Sequence[Any]
    needs: Sequence[bool]


def compile_kernels(calls: Iterable[Call], device: torch.device) -> None:
    """Compiles what these calls launch, if `device` is a GPU that runs kernels.

    Raises:
        Exception: whatever the compiler raises. What was not compiled is compiled when it is launched.
    """
    if device.type != "cuda" or not forms.runs_kernels(device):
        return
    from fastlora.kernels.gpu import ahead, launch  # where kernels run there is Triton, which they import

    launch.take_for(launch.real(device))
    with forms.rehearsed(), ahead.recorded() as launches:
        for call in calls:
            call.op.rehearse(call.values, call.needs)
    ahead.compile_all(launches, device)
