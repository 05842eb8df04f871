"""Probes of `fastlora.compat.autograd`."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks

from fastlora.compat import autograd
from fastlora.compat.probes.probe import collector, expect

PROBES, probe = collector()


@probe("graph_task_id", "NO_BACKWARD")
def _running_backward_has_an_id() -> None:
    seen: list[int] = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: seen.append(autograd.graph_task_id()))
    expect(autograd.graph_task_id() == autograd.NO_BACKWARD, "no backward is running by default")
    y.backward()
    expect(seen and seen[0] != autograd.NO_BACKWARD, "a running backward has an id")


@probe("saved_tensors_hooks")
def _saved_tensors_hooks_are_returned() -> None:
    def pack(t: torch.Tensor) -> torch.Tensor:
        return t

    expect(autograd.saved_tensors_hooks(True) is None, "there are no hooks by default")
    with saved_tensors_hooks(pack, pack):
        expect(autograd.saved_tensors_hooks(True) == (pack, pack), "the pair of hooks is returned")


@probe("saved_tensors_hooks_disabled")
def _disabled_hooks_are_reported() -> None:
    expect(autograd.saved_tensors_hooks_disabled() is None, "hooks are allowed by default")
    with disable_saved_tensors_hooks("not here"):
        expect(autograd.saved_tensors_hooks_disabled() == "not here", "the message of the region is returned")


@probe("foreach_copy_")
def _lists_of_tensors_are_copied() -> None:
    to: list[Any] = [torch.zeros(2), torch.zeros(3)]
    autograd.foreach_copy_(to, [torch.ones(2), torch.ones(3)])
    expect(all(t.eq(1).all() for t in to), "every tensor is copied")


@probe("forward_mode_is_active")
def _forward_mode_is_detected() -> None:
    expect(not autograd.forward_mode_is_active(), "forward mode is off by default")
    with forward_ad.dual_level():
        expect(autograd.forward_mode_is_active(), "forward mode is on inside a level")


@probe("storage_id")
def _views_share_a_storage() -> None:
    t = torch.zeros(4)
    expect(autograd.storage_id(t) == autograd.storage_id(t[1:]), "a view has the storage of its base")
    expect(autograd.storage_id(t) != autograd.storage_id(t.clone()), "a copy has another storage")
