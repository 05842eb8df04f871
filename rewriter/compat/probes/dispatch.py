"""Probes of `fastlora.compat.dispatch`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastlora.compat import dispatch
from fastlora.compat.probes.probe import collector, expect

PROBES, probe = collector()


class _NoOpMode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class _CountsOverrides(torch.Tensor):
    """Counts the calls of its function override."""

    calls = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def _calls_of_override() -> int:
    """Return how often the override is called for one operation."""
    t, before = torch.zeros(1).as_subclass(_CountsOverrides), _CountsOverrides.calls
    torch.neg(t)
    return _CountsOverrides.calls - before


@probe("dispatch_modes", "disable_modes", "TorchDispatchMode")
def _modes_are_counted_and_can_be_disabled() -> None:
    before = dispatch.dispatch_modes()
    with _NoOpMode():
        expect(dispatch.dispatch_modes() == before + 1, "a mode is counted inside it")
        with dispatch.disable_modes():
            expect(dispatch.dispatch_modes() == 0, "no mode is active while modes are disabled")


@probe("functorch_interpreter")
def _transforms_are_detected() -> None:
    found: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        found.append(dispatch.functorch_interpreter() is not None)
        return x.sum()

    torch.func.vmap(function)(torch.zeros(2, 2))
    expect(dispatch.functorch_interpreter() is None, "no transform is active by default")
    expect(found == [True], "a transform is active inside it")


@probe("function_overrides_are_enabled", "disable_function_overrides", "enable_function_overrides")
def _overrides_can_be_switched() -> None:
    expect(dispatch.function_overrides_are_enabled() and _calls_of_override(), "overrides are called by default")
    with dispatch.disable_function_overrides():
        expect(not _calls_of_override(), "overrides are not called while they are disabled")
        expect(not dispatch.function_overrides_are_enabled(), "that they are disabled is reported")
        with dispatch.enable_function_overrides():
            expect(_calls_of_override(), "overrides are called if they are enabled again")


@probe("make_wrapper_subclass", "forbid_data_pointer")
def _a_subclass_without_memory_can_be_made() -> None:
    class Wrapper(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, *_: Any, **__: Any) -> Any:
            return NotImplemented

    made = dispatch.make_wrapper_subclass(
        Wrapper, (2, 3), strides=(1, 2), storage_offset=0, dtype=torch.float16, device=torch.device("cpu")
    )
    expect((made.shape, made.stride(), made.dtype) == ((2, 3), (1, 2), torch.float16), "sizes and dtype are as given")
    dispatch.forbid_data_pointer(made)
    try:
        made.data_ptr()
    except RuntimeError:
        return
    expect(False, "its data pointer raises an error")


@probe("is_wrapper_subclass")
def _wrapper_subclasses_are_recognized() -> None:
    class Pair(torch.Tensor):
        def __tensor_flatten__(self) -> Any: ...

        @staticmethod
        def __tensor_unflatten__(*_: Any) -> Any: ...

    expect(not dispatch.is_wrapper_subclass(torch.zeros(1)), "a plain tensor wraps nothing")
    expect(not dispatch.is_wrapper_subclass(nn.Parameter(torch.zeros(1))), "a parameter wraps nothing")
    expect(dispatch.is_wrapper_subclass(torch.zeros(1).as_subclass(Pair)), "a class with __tensor_flatten__ does")


@probe("grouped_mm")
def _grouped_products_have_an_older_name() -> None:
    groups = torch.nn.functional.grouped_mm
    expect(callable(dispatch.grouped_mm) and callable(groups), "both names are functions")


@probe("function_modes_change_results")
def _default_device_is_ignored() -> None:
    class Nothing(torch.overrides.TorchFunctionMode):
        pass

    expect(not dispatch.function_modes_change_results(), "no mode is active by default")
    with torch.device("cpu"):
        expect(not dispatch.function_modes_change_results(), "a default device does not count")
    with Nothing():
        expect(dispatch.function_modes_change_results(), "other modes count")


@probe("schema_of", "OpOverload", "OpOverloadPacket", "HigherOrderOperator")
def _operators_have_schemas() -> None:
    aten = torch.ops.aten
    expect(isinstance(aten.add.Tensor, dispatch.OpOverload), "an operator is an OpOverload")
    expect(isinstance(aten.add, dispatch.OpOverloadPacket), "a packet is an OpOverloadPacket")
    tagged = torch.ops.higher_order.tag_activation_checkpoint
    expect(isinstance(tagged, dispatch.HigherOrderOperator), "a checkpoint in a graph is a HigherOrderOperator")
    expect(tagged.name() == "tag_activation_checkpoint", "its name is tag_activation_checkpoint")
    view, add = dispatch.schema_of(aten.view.default), dispatch.schema_of(aten.add_.Tensor)
    expect(
        view.returns[0].alias_info is not None and not view.is_mutable,
        "a view aliases its argument and writes to nothing",
    )
    expect(
        add.is_mutable and add.arguments[0].alias_info is not None,
        "the schema of an in-place operator has its mutated argument",
    )


@probe("tree_leaves", "tree_map", "tree_map_only")
def _pytrees_are_mapped() -> None:
    tree: Any = {"a": [1, (2, "b")]}
    expect(dispatch.tree_leaves(tree) == [1, 2, "b"], "leaves are in order")
    expect(dispatch.tree_map(lambda each: each * 2, tree) == {"a": [2, (4, "bb")]}, "every leaf is mapped")
    expect(
        dispatch.tree_map_only(int, lambda each: -each, tree) == {"a": [-1, (-2, "b")]}, "leaves of a type are mapped"
    )
