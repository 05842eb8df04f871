"""Which gradients a backward computes, and which arguments they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastlora.kernels.core.schema import Leaves

Gradients = dict[str, Any]
"""Gradients by argument: a tensor or None, or a list of them for a list of tensors."""
Wanted = dict[str, Any]
"""Whether a gradient is wanted, by argument: a bool, or a list of them for a list of tensors."""


@dataclass(frozen=True)
class SharedGradients:
    """Arguments that share a gradient tensor, since an operator may not return a tensor twice, nor one of its inputs.

    Attributes:
        names: the op's tensor arguments, in order; if any are shared, none is a list.
        tied: arguments with equal gradients, such as the operands of a sum; it is computed for the first.
        passthrough: arguments whose gradient is the incoming one of the first output.
    """

    names: tuple[str, ...]
    tied: tuple[str, ...] = ()
    passthrough: tuple[str, ...] = ()

    def to_compute(self, needs: Sequence[bool]) -> list[bool]:
        """Return which gradients the backward operator has to compute, given which ones are needed."""
        flags = list(needs)
        for name in (*self.tied, *self.passthrough):
            flags[self.names.index(name)] = False
        if self.tied:
            flags[self.names.index(self.tied[0])] = any(needs[self.names.index(name)] for name in self.tied)
        return flags

    def distribute(
        self,
        computed: Sequence[torch.Tensor],
        to_compute: Sequence[bool],
        needs: Sequence[bool],
        incoming: torch.Tensor | None,
    ) -> list[torch.Tensor | None]:
        """Return a gradient for each tensor leaf, None where none is needed, from those computed for `to_compute`."""
        remaining = iter(computed)
        results = [next(remaining) if flag else None for flag in to_compute]
        if self.tied:
            shared = results[self.names.index(self.tied[0])]
            for name in self.tied:
                results[self.names.index(name)] = shared if needs[self.names.index(name)] else None
        for name in self.passthrough:
            results[self.names.index(name)] = incoming if needs[self.names.index(name)] else None
        return results


def reachable(
    needs: Sequence[bool],
    grads: Sequence[torch.Tensor | None],
    leaves: Leaves,
    outputs: Leaves,
    read_by: dict[str, int],
) -> list[bool]:
    """Return `needs` without the leaves that only outputs without an incoming gradient depend on.

    Args:
        needs: the leaves that require gradients.
        grads: the incoming gradients, a flat list.
        leaves, outputs: the tensor leaves of the op's arguments and of its outputs.
        read_by: arguments that only one output depends on, with that output's position.
    """
    wanted = leaves.named(needs)
    for name, output in read_by.items():
        if grads[output] is None:
            wanted[name] = [False] * len(wanted[name]) if isinstance(wanted[name], list) else False
    lists = [g for g in outputs.grouped(grads) if isinstance(g, list)]
    if lists:
        alive = [any(g is not None for g in member) for member in zip(*lists, strict=True)]
        for name, need in wanted.items():
            if isinstance(need, list):
                wanted[name] = [n and a for n, a in zip(need, alive, strict=True)]
    return leaves.flat_gradients(wanted, wanted)
