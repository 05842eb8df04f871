"""Tensors whose value is computed only when something reads it.

A `Deferred` is a tensor subclass without storage. Autograd sees an ordinary tensor with a history, so hooks, custom
autograd functions, views, in-place writes and `torch.autograd.grad` work as on any other tensor. If an operation needs
the elements, `__torch_dispatch__`, which runs below autograd, computes them: once, without recording gradients, in
whatever mode the caller is. Subclasses define which operations stay deferred.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.autograd.graph import GradientEdge, get_gradient_edge

from fastlora.compat.autograd import saved_tensors_hooks
from fastlora.compat.dispatch import (
    disable_function_overrides,
    enable_function_overrides,
    forbid_data_pointer,
    make_wrapper_subclass,
    schema_of,
    tree_map_only,
)
from fastlora.errors import FastLoRAError
from fastlora.logits.lazy_value import LazyValue

_TENSOR: Any = torch.Tensor
_READS_MEMORY = {
    *(getattr(_TENSOR, name) for name in (
        "__array__", "__deepcopy__", "__dlpack__", "__reduce_ex__", "__repr__", "apply_", "as_subclass", "data_ptr",
        "map_", "map2_", "numpy", "share_memory_", "storage", "tolist", "untyped_storage", "_typed_storage",
    )),
    _TENSOR.__cuda_array_interface__.__get__,
}  # fmt: skip
"""Functions that access a tensor's memory without an operator that the dispatcher sees, and may write to it."""


class Deferred(torch.Tensor):
    """A tensor whose elements are computed when they are read; see this module's docstring.

    Attributes:
        lazy: the value, which may not be computed yet.
        meta: a tensor on the meta device with the same sizes, strides and dtype.
    """

    lazy: LazyValue
    meta: torch.Tensor
    _overrides: ClassVar[dict[Any, Callable[..., Any]]] = {}
    """Overrides of PyTorch functions, which return `NotImplemented` for arguments that they do not support."""

    @staticmethod
    def __new__(cls, lazy: LazyValue, meta: torch.Tensor, device: torch.device, **_: Any) -> Deferred:
        made = make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype,
            device=device,
        )  # fmt: skip
        made.lazy, made.meta = lazy, meta
        forbid_data_pointer(made)  # otherwise code that reads memory past all overrides would read address 0
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def apply(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the deferred result of an operation whose first argument is this tensor, or `NotImplemented` if the
        elements are needed."""
        return NotImplemented

    @classmethod
    def apply_to_list(cls, func: Any, tensors: list[Any], args: tuple[Any, ...]) -> Any:
        """Do the same for an operation whose first argument is a list of tensors."""
        return NotImplemented

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = _call_untraced if torch.compiler.is_compiling() else _call
        return call(cls._overrides, func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        result = _apply_deferred(func, args, kwargs)
        if result is not NotImplemented:
            return result
        if any(argument.alias_info is not None for argument in schema_of(func).arguments):
            return _share(func, args, kwargs)
        args, kwargs = tree_map_only(Deferred, lambda t: t.lazy.get(), (args, kwargs))
        return func(*args, **kwargs)


def _call(overrides: dict[Any, Callable[..., Any]], func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    with disable_function_overrides(), _hooks_see_overrides():
        override = overrides.get(func) or _OVERRIDES.get(func)
        if override is not None:
            result = override(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _READS_MEMORY:
            args, kwargs = tree_map_only(Deferred, _with_memory, (args, kwargs))
        return func(*args, **kwargs)


_call_untraced = torch.compiler.disable(_call)


@contextmanager
def _hooks_see_overrides() -> Iterator[None]:
    """Enable function overrides in pack hooks, which are the user's code; they are disabled around the call."""
    hooks = saved_tensors_hooks(True)
    if hooks is None:
        yield
        return
    pack, unpack = hooks

    def pack_with_overrides(t: torch.Tensor) -> Any:
        with enable_function_overrides():
            return pack(t)

    with torch.autograd.graph.saved_tensors_hooks(pack_with_overrides, unpack):
        yield


def _tuple(tensors: Any) -> tuple[Any, ...]:
    return (tensors,) if tensors is None or isinstance(tensors, (torch.Tensor, GradientEdge)) else tuple(tensors)


def _edges(roots: Any, inputs: Any, gradients: Any) -> tuple[list[Any], list[Any], tuple[Any, ...]] | None:
    """Return roots and inputs with gradient edges in place of deferred tensors, and a gradient for each root.

    A backward from or to edges runs hooks with function overrides enabled. Returns None if PyTorch would raise.
    """
    roots, inputs = _tuple(roots), _tuple(inputs) if inputs is not None else ()
    given = (None,) * len(roots) if gradients is None else _tuple(gradients)
    needs_scalar_root = any(g is None and isinstance(t, Deferred) for t, g in zip(roots, given, strict=False))
    if needs_scalar_root or len(given) != len(roots):
        return None
    if not all(t.requires_grad for t in (*roots, *inputs) if isinstance(t, Deferred)):
        return None
    edges = [[get_gradient_edge(t) if isinstance(t, Deferred) else t for t in each] for each in (roots, inputs)]
    return edges[0], edges[1], given


def _backward(
    tensors: Any, grad_tensors: Any = None, retain_graph: Any = None, create_graph: bool = False,
    grad_variables: Any = None, inputs: Any = None,
) -> Any:  # fmt: skip
    found = None if grad_variables is not None else _edges(tensors, inputs, grad_tensors)
    if found is None:
        return NotImplemented
    roots, ends, given = found
    with enable_function_overrides():
        torch.autograd.backward(roots, given, retain_graph, create_graph, inputs=ends if inputs is not None else None)
    return None


def _tensor_backward(
    t: Any, gradient: Any = None, retain_graph: Any = None, create_graph: bool = False, inputs: Any = None
) -> Any:
    return _backward(t, gradient, retain_graph, create_graph, inputs=inputs)


def _grad(outputs: Any, inputs: Any, grad_outputs: Any = None, *args: Any, **kwargs: Any) -> Any:
    found = _edges(outputs, inputs, grad_outputs)
    if found is None:
        return NotImplemented
    with enable_function_overrides():
        return torch.autograd.grad(found[0], found[1], found[2], *args, **kwargs)


def _data(t: torch.Tensor) -> torch.Tensor:
    return _with_memory(t).detach() if isinstance(t, Deferred) else t.data


def _set_data(t: torch.Tensor, value: torch.Tensor) -> None:
    raise FastLoRAError(
        "the data of deferred logits cannot be replaced; use fastlora.compile(model, defer_logits=False)"
    )


_OVERRIDES: dict[Any, Callable[..., Any]] = {
    _TENSOR.backward: _tensor_backward,
    torch.autograd.backward: _backward,
    torch.autograd.grad: _grad,
    _TENSOR.data.__get__: _data,
    _TENSOR.data.__set__: _set_data,
}


def plain(t: Any) -> Any:
    """Return the value of a deferred tensor, without history, and anything else unchanged."""
    return t.lazy.get() if isinstance(t, Deferred) else t


def is_view(func: Any) -> bool:
    """Return whether the results of an operator alias its arguments."""
    return any(result.alias_info is not None for result in schema_of(func).returns)


def _apply_deferred(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first = args[0] if args else None
    if torch.is_inference_mode_enabled():  # autograd may not see its results
        return NotImplemented
    if isinstance(first, Deferred):
        return NotImplemented if first.lazy.storage.is_shared else first.apply(func, args[1:], kwargs)
    if isinstance(first, list) and first and isinstance(first[0], Deferred):
        return type(first[0]).apply_to_list(func, first, args[1:])
    return NotImplemented


def _share(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator that writes to or aliases its arguments on their values; return a deferred argument itself where
    the operator returns its value.

    Raises:
        FastLoRAError: if the operator changes the sizes of a deferred tensor.
    """
    shared: dict[int, Deferred] = {}

    def value(t: Deferred) -> torch.Tensor:
        found = t.lazy.share()
        shared[id(found)] = t
        return found

    values, options = tree_map_only(Deferred, value, (args, kwargs))
    tensors = [t for t in (*values, *options.values()) if isinstance(t, torch.Tensor)]
    sizes = [(t.shape, t.stride()) for t in tensors]
    result = tree_map_only(torch.Tensor, lambda t: shared.get(id(t), t), func(*values, **options))
    if shared and sizes != [(t.shape, t.stride()) for t in tensors]:
        raise FastLoRAError(
            f"{func} changes the sizes of deferred logits in place; use fastlora.compile(model, defer_logits=False)"
        )
    if schema_of(func).is_mutable and args and isinstance(args[0], list):
        for t in args[0]:  # PyTorch does not increment the versions of subclasses in a list
            if isinstance(t, Deferred):
                torch.autograd.graph.increment_version(t)
    return result


class _Share(torch.autograd.Function):
    """Returns the value of a deferred tensor as a plain tensor that autograd connects to it."""

    @staticmethod
    def forward(ctx: Any, t: Deferred) -> torch.Tensor:
        return t.lazy.share().detach()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def _with_memory(t: Deferred) -> torch.Tensor:
    made: torch.Tensor = _Share.apply(t)
    return made
