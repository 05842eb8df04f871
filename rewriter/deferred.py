"""Tensors whose value is computed only when something reads it.

A `Deferred` is a tensor subclass without storage. Autograd sees an ordinary tensor with a history, so hooks, custom
autograd functions, views, in-place writes and `torch.autograd.grad` work as on any other. Only where an operation needs
the elements, below autograd at `__torch_dispatch__`, are they computed: once, without recording gradients, in whatever
mode the caller is. Subclasses say which operations stay deferred as well.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.utils._pytree import tree_map_only

_TENSOR: Any = torch.Tensor
_READS_MEMORY = {
    *(getattr(_TENSOR, name) for name in (
        "__array__", "__deepcopy__", "__dlpack__", "__reduce_ex__", "__repr__", "data_ptr", "numpy", "share_memory_",
        "storage", "tolist", "untyped_storage", "_typed_storage",
    )),
    _TENSOR.__cuda_array_interface__.__get__,
}  # fmt: skip
"""Functions that reach the memory without an operation that the dispatcher sees, and may write to it."""


class Memory:
    """What tells whether the memory of some values is in other hands, and may be written to unseen."""

    def __init__(self) -> None:
        self.is_shared = False


class Cell:
    """A value that is computed at its first use.

    Cells that are computed from one another form a family. Before an in-place write to one, all of them are computed:
    those that are views then see the write, copies do not.
    """

    __slots__ = ("__weakref__", "_compute", "_family", "_parent", "_value", "memory")

    def __init__(
        self, compute: Callable[[], torch.Tensor], parent: Cell | None = None, memory: Memory | None = None
    ) -> None:
        self._compute: Callable[[], torch.Tensor] | None = compute
        self._parent = parent
        self._family: list[weakref.ref[Cell]] = [] if parent is None else parent._family
        self._value: torch.Tensor | None = None
        self.memory = Memory() if memory is None else memory
        self._family.append(weakref.ref(self))

    @property
    def is_computed(self) -> bool:
        """Whether this value is there, or the one that it is made of."""
        return self._value is not None or (self._parent is not None and self._parent.is_computed)

    def get(self) -> torch.Tensor:
        """Return the value, computed outside of the caller's gradient and inference modes."""
        if self._value is None:
            assert self._compute is not None
            with torch.inference_mode(False), torch.no_grad():
                self._value = self._compute()
            self._compute = self._parent = None
        return self._value

    def derive(self, operation: Callable[[torch.Tensor], torch.Tensor], is_view: bool = False) -> Cell:
        """Return the cell of what `operation` makes of this value."""
        return Cell(lambda: operation(self.get()), self, self.memory if is_view else None)

    def share(self) -> torch.Tensor:
        """Return the value to somebody who may write to it, or keep its memory."""
        for relative in self._family:
            if (cell := relative()) is not None:
                cell.get()
        self.memory.is_shared = True
        return self.get()


class Deferred(torch.Tensor):
    """A tensor whose elements are computed when they are read; see this module's docstring.

    Attributes:
        cell: where the value is, or will be.
        meta: a tensor on the meta device with this one's sizes, strides and dtype.
    """

    cell: Cell
    meta: torch.Tensor
    _overrides: ClassVar[dict[Any, Callable[..., Any]]] = {}
    """Functions with a deferred form of their own, which returns `NotImplemented` for arguments that it cannot take."""

    @staticmethod
    def __new__(cls, cell: Cell, meta: torch.Tensor, device: torch.device, **_: Any) -> Deferred:
        made = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype,
            device=device,
        )  # fmt: skip
        made.cell, made.meta = cell, meta
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an operation makes of this tensor, its first argument, still deferred; `NotImplemented` if the
        elements are needed."""
        return NotImplemented

    @classmethod
    def apply_to_list(cls, func: Any, tensors: list[Any], args: tuple[Any, ...]) -> Any:
        """The same for an operation whose first argument is a list of tensors."""
        return NotImplemented

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _call(cls._overrides, func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        result = _apply_deferred(func, args, kwargs)
        if result is not NotImplemented:
            return result
        if any(argument.alias_info is not None for argument in func._schema.arguments):
            return _share(func, args, kwargs)
        args, kwargs = tree_map_only(Deferred, lambda t: t.cell.get(), (args, kwargs))
        return func(*args, **kwargs)


@torch.compiler.disable
def _call(overrides: dict[Any, Callable[..., Any]], func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        if (override := overrides.get(func)) is not None:
            result = override(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _READS_MEMORY:
            args, kwargs = tree_map_only(Deferred, _with_memory, (args, kwargs))
        return func(*args, **kwargs)


def plain(t: Any) -> Any:
    """Return the value of a deferred tensor, without history, and anything else as it is."""
    return t.cell.get() if isinstance(t, Deferred) else t


def is_view(func: Any) -> bool:
    """Whether an operation returns the memory of its argument."""
    return any(result.alias_info is not None for result in func._schema.returns)


def _apply_deferred(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first = args[0] if args else None
    if torch.is_inference_mode_enabled():  # whose results autograd may never see
        return NotImplemented
    if isinstance(first, Deferred):
        return NotImplemented if first.cell.memory.is_shared else first.apply(func, args[1:], kwargs)
    if isinstance(first, list) and first and isinstance(first[0], Deferred):
        return type(first[0]).apply_to_list(func, first, args[1:])
    return NotImplemented


def _share(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation that writes to its arguments or hands out their memory, on values; return an argument itself
    where the operation does."""
    shared: dict[int, Deferred] = {}

    def value(t: Deferred) -> torch.Tensor:
        found = t.cell.share()
        shared[id(found)] = t
        return found

    values, options = tree_map_only(Deferred, value, (args, kwargs))
    result = tree_map_only(torch.Tensor, lambda t: shared.get(id(t), t), func(*values, **options))
    if (
        func._schema.is_mutable and args and isinstance(args[0], list)
    ):  # of lists PyTorch counts no writes to subclasses
        for t in args[0]:
            if isinstance(t, Deferred):
                torch.autograd.graph.increment_version(t)
    return result


class _Share(torch.autograd.Function):
    """Returns the value of a deferred tensor as a plain tensor in its history."""

    @staticmethod
    def forward(ctx: Any, t: Deferred) -> torch.Tensor:
        return t.cell.share().detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _with_memory(t: Deferred) -> torch.Tensor:
    made: torch.Tensor = _Share.apply(t)
    return made
