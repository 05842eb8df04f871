"""Probes of `fastlora.compat.modules`."""

from __future__ import annotations

import copy
import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from fastlora.compat import modules
from fastlora.compat.probes.probe import collector, expect

PROBES, probe = collector()


@probe("compiled_call", "set_compiled_call", "uncompiled_call")
def _compiled_call_slot_replaces_the_call() -> None:
    module, x = nn.ReLU(), torch.ones(1)
    expect(modules.compiled_call(module) is None, "the slot is empty at first")

    def twice(x: torch.Tensor) -> Any:
        return 2 * modules.uncompiled_call(module)(x)

    modules.set_compiled_call(module, twice)
    expect(modules.compiled_call(module) is twice and module(x).item() == 2.0, "the function in the slot is called")
    expect(modules.compiled_call(copy.deepcopy(module)) is None, "a copy has an empty slot")
    expect(not module.state_dict(), "the slot is not in the state dict")
    modules.set_compiled_call(module, None)
    expect(module(x).item() == 1.0, "the module itself runs if the slot is empty")


@probe("module_of_call")
def _the_calling_module_is_found() -> None:
    module = nn.ReLU()
    found: list[nn.Module | None] = []
    modules.set_compiled_call(module, lambda x: found.append(modules.module_of_call(1)))
    module(torch.ones(1))
    expect(found == [module], "the module is found in the frame of its __call__")
    expect(modules.module_of_call(0) is None, "no module is found in another frame")


@probe("hooks_of")
def _hooks_are_listed() -> None:
    def hook(*_: Any) -> None: ...

    module = nn.ReLU()
    expect(not any(modules.hooks_of(module)), "there are no hooks at first")
    handles = (
        module.register_forward_hook(hook), module.register_forward_pre_hook(hook),
        module.register_full_backward_hook(hook), module.register_full_backward_pre_hook(hook),
    )  # fmt: skip
    expect(all(hook in hooks.values() for hooks in modules.hooks_of(module)), "each kind of hook is listed")
    before = type(handles[0]).next_id
    for handle in handles:
        handle.remove()
    expect(not any(modules.hooks_of(module)), "a hook that was removed is not listed")
    module.register_forward_hook(hook)
    expect(type(handles[0]).next_id > before, "RemovableHandle.next_id counts up with every hook")


@probe("global_hooks_exist")
def _global_hooks_are_detected() -> None:
    before = modules.global_hooks_exist()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        expect(modules.global_hooks_exist(), "a global hook is detected")
    finally:
        handle.remove()
    expect(modules.global_hooks_exist() == before, "a removed hook is not detected")


@probe("children_of", "parameters_of")
def _children_and_parameters_are_listed() -> None:
    module = nn.Sequential(nn.Linear(1, 1, bias=False))
    expect(modules.children_of(module) == {"0": module[0]}, "children are listed by name")
    expect(
        modules.parameters_of(module[0]) == {"weight": module[0].weight, "bias": None}, "parameters are listed by name"
    )


@probe("Dropout")
def _dropouts_have_a_base_class() -> None:
    expect(isinstance(nn.Dropout(0.5), modules.Dropout) and nn.Dropout(0.5).p == 0.5, "nn.Dropout has p")
    expect(isinstance(nn.Dropout2d(0.5), modules.Dropout), "nn.Dropout2d has the same base")


@probe("frees_parameters_after_forward")
def _fsdp_state_has_parameter_groups() -> None:
    if not torch.distributed.is_available():
        return
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    expect(hasattr(FSDPModule, "_get_fsdp_state"), "an FSDPModule has a state")
    state = FSDPState()
    expect(
        hasattr(state, "_fsdp_param_groups") or hasattr(state, "_fsdp_param_group"),
        "the state has groups of parameters",
    )
    for frees in (True, False):
        module = SimpleNamespace(_get_fsdp_state=lambda frees=frees: _state(frees))
        expect(modules.frees_parameters_after_forward(module) is frees, "the group has whether it frees parameters")


def _state(frees: bool) -> Any:
    return SimpleNamespace(_fsdp_param_groups=[SimpleNamespace(_reshard_after_forward=frees)])


@probe("run_experts_one_by_one")
def _experts_implementation_is_replaced() -> None:
    transformers: Any = sys.modules.get("transformers")
    if transformers is None:  # not installed or not imported
        return
    config = transformers.PretrainedConfig(experts_implementation="grouped_mm")
    modules.run_experts_one_by_one(config)
    expect(config._experts_implementation == "eager", "grouped products are replaced")
