"""Deferred logits: hidden states and the head's weight, in place of their product.

A Hugging Face model returns its logits next to its loss, and some trainers compute the loss outside, so fusing head and
loss inside a graph would save nothing. While gradients are on, the head returns `DeferredLogits` instead. Casts, views,
leading slices, a bias and a scale or soft-cap keep them deferred; a cross-entropy taken from them runs the fused op;
anything else multiplies, replaying exactly the operations that were deferred, and goes on with the ordinary tensor,
gradients connected.
"""

from __future__ import annotations

import traceback
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only

from fastlora.recipe import Recipe


@dataclass
class Tally:
    """How often a head deferred, how often its logits met a loss, and which lines made them ordinary tensors. `dry`
    computes no loss."""

    deferred: int = 0
    fused: int = 0
    materialised: Counter[str] = field(default_factory=Counter)
    dry: bool = False


class DeferredLogits(torch.Tensor):
    """Logits that are multiplied out only if something needs them; see this module's docstring."""

    recipe: Recipe
    tally: Tally
    origin: Callable[[], torch.Tensor]
    product: torch.Tensor | None
    family: list[weakref.ref[DeferredLogits]]

    @staticmethod
    def __new__(
        cls,
        recipe: Recipe,
        tally: Tally,
        origin: Callable[[], torch.Tensor],
        family: list[weakref.ref[DeferredLogits]],
    ) -> DeferredLogits:
        made = torch.Tensor._make_wrapper_subclass(cls, recipe.shape, dtype=recipe.dtype, device=recipe.hidden.device)
        made.recipe, made.tally, made.origin, made.product = recipe, tally, origin, None
        made.family = family
        family.append(weakref.ref(made))
        return made

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def then(self, recipe: Recipe, operation: Callable[[torch.Tensor], torch.Tensor]) -> DeferredLogits:
        """The logits after one more operation; if they are ever needed, that very operation is replayed."""
        return DeferredLogits(recipe, self.tally, lambda: operation(self.materialise(counted=False)), self.family)

    def materialise(self, counted: bool = True) -> torch.Tensor:
        """The logits as an ordinary tensor, computed once."""
        if self.product is None:
            if counted:
                self.tally.materialised[_caller()] += 1
            self.product = self.origin()
        return self.product

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            subject = args[0] if args else kwargs.get("input")
            if func in _METADATA:
                return func(*args, **kwargs)
            if isinstance(subject, DeferredLogits) and func in _HANDLERS and subject.product is None:
                rest = {name: value for name, value in kwargs.items() if args or name != "input"}
                result = _HANDLERS[func](*(args or (subject,)), **rest)
                if result is not None:
                    return result
            if isinstance(subject, DeferredLogits) and _writes(func):
                for relative in subject.family:  # views among them have to see the change, copies must not
                    if (member := relative()) is not None:
                        member.materialise()
            args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.materialise, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(
            f"{func} reached deferred logits past PyTorch's function overrides, where their gradient would be lost; "
            "use fastlora.compile(model, defer_logits=False)"
        )


class DeferringHead:
    """Sits in the head's compiled-call slot: defers the product while gradients are on, else calls the module."""

    def __init__(self, head: nn.Linear, tally: Tally) -> None:
        self._head, self._tally = head, tally

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and self._defers(args[0]):
            return defer(args[0], self._head.weight, self._head.bias, self._tally)
        return self._head._call_impl(*args, **kwargs)

    def _defers(self, hidden: Any) -> bool:
        head = self._head
        hooked = head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks
        return not hooked and not torch.compiler.is_compiling() and is_worthwhile(hidden, head.weight)


def can_defer(head: nn.Module | None) -> bool:
    """Whether a head is a plain linear layer on a vocabulary larger than the hidden size."""
    return type(head) is nn.Linear and head.out_features > head.in_features and head.weight.device.type != "meta"


def is_worthwhile(hidden: Any, *parameters: torch.Tensor) -> bool:
    """Whether a head's product of plain tensors has a gradient, so that a loss is likely to be taken from it."""
    plain = type(hidden) is torch.Tensor and all(type(t) in (torch.Tensor, nn.Parameter) for t in parameters)
    return plain and torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *parameters))


def defer(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tally: Tally) -> DeferredLogits:
    """Deferred `F.linear(hidden, weight, bias)`, in the dtype that autocast would give it."""
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return begin(Recipe(hidden, weight, bias, dtype, dtype), tally)


def begin(recipe: Recipe, tally: Tally) -> DeferredLogits:
    """The deferred logits of a recipe to which nothing was done yet."""
    tally.deferred += 1
    recipe = replace(recipe, versions=recipe.now())
    return DeferredLogits(recipe, tally, recipe.multiply, [])


def _writes(func: Any) -> bool:
    """Whether a tensor function works in place, by PyTorch's naming."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _caller() -> str:
    """The innermost line outside of PyTorch and this file: who needed the logits."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename != __file__ and "/torch/" not in frame.filename:
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    return "an unknown line"


# -- what keeps logits deferred: each handler answers None to have them multiplied -------------------------------------


def _cast(logits: DeferredLogits, dtype: torch.dtype) -> DeferredLogits | None:
    before, after = torch.finfo(logits.dtype), torch.finfo(dtype)
    if after.bits < before.bits:
        return None
    return logits.then(replace(logits.recipe, dtype=dtype), lambda real: real.to(dtype))


def _to(logits: DeferredLogits, *args: Any, **kwargs: Any) -> DeferredLogits | None:
    target = (
        args[0] if len(args) == 1 and not kwargs else kwargs.get("dtype") if not args and len(kwargs) == 1 else None
    )
    if isinstance(target, torch.dtype) and target.is_floating_point:
        return _cast(logits, target)
    return logits if isinstance(target, (torch.device, str)) and torch.device(target) == logits.device else None


def _view(logits: DeferredLogits, *shape: Any) -> DeferredLogits | None:
    sizes = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if not all(isinstance(size, int) for size in sizes) or sizes[-1] != logits.shape[-1]:
        return None
    hidden = logits.recipe.hidden
    moved = hidden.reshape(*sizes[:-1], hidden.shape[-1])
    return logits.then(logits.recipe.of(hidden=moved), lambda real: real.reshape(sizes))


def _same(logits: DeferredLogits, *_: Any, **__: Any) -> DeferredLogits:
    return logits


def _detach(logits: DeferredLogits) -> DeferredLogits:
    return logits.then(logits.recipe.detached(), lambda real: real.detach())


def _getitem(logits: DeferredLogits, index: Any) -> DeferredLogits | None:
    """Slices of the leading dimensions are slices of the hidden states."""
    parts = index if isinstance(index, tuple) else (index,)
    full = slice(None)
    if not all(part is Ellipsis or isinstance(part, slice) for part in parts):
        return None
    reaches_last = Ellipsis in parts or len(parts) == logits.dim()
    if reaches_last and parts[-1] is not Ellipsis and parts[-1] != full:
        return None
    return logits.then(logits.recipe.of(hidden=logits.recipe.hidden[index]), lambda real: real[index])


def _plus(logits: DeferredLogits, other: Any, **options: Any) -> DeferredLogits | None:
    """A bias, if the head has none and nothing else was done before."""
    recipe = logits.recipe
    untouched = recipe.dtype is recipe.base_dtype and recipe.scale == 1.0 and not recipe.squashed
    untouched &= recipe.adapter is None
    if options or recipe.bias is not None or not untouched or type(other) not in (torch.Tensor, nn.Parameter):
        return None
    if (
        other.is_inference()
        or other.dtype != recipe.dtype
        or other.device != logits.device
        or not 0 < other.dim() <= logits.dim()
    ):
        return None
    if other.shape[-1] != logits.shape[-1] or other.numel() != logits.shape[-1]:
        return None
    return logits.then(recipe.of(bias=other.reshape(-1)), lambda real: real + other)


def _scaled(factor: Callable[[Any], Any], operation: Callable[..., Any]) -> Callable[..., DeferredLogits | None]:
    def handler(logits: DeferredLogits, other: Any) -> DeferredLogits | None:
        if isinstance(other, bool) or not isinstance(other, (int, float)) or other <= 0:
            return None
        recipe, by = logits.recipe, factor(other)
        after = replace(recipe, gain=recipe.gain * by) if recipe.squashed else replace(recipe, scale=recipe.scale * by)
        return logits.then(after, lambda real: operation(real, other))

    return handler


def _tanh(logits: DeferredLogits) -> DeferredLogits | None:
    if logits.recipe.squashed:
        return None
    return logits.then(replace(logits.recipe, squashed=True), torch.tanh)


def _cross_entropy(
    logits: Any, target: Any, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> torch.Tensor | None:  # fmt: skip
    plain = weight is None and size_average is None and reduce is None and logits.dim() == 2
    if not plain or type(target) is not torch.Tensor or target.dim() != 1 or target.is_floating_point():
        return None
    recipe = logits.recipe
    if torch.is_autocast_enabled(logits.device.type):  # which takes losses in float32
        recipe = replace(recipe, dtype=torch.promote_types(recipe.dtype, torch.float32))
    logits.tally.fused += 1
    if logits.tally.dry:
        return logits.recipe.hidden.sum() * 0.0
    return recipe.cross_entropy(target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing)


def _requires_grad(logits: DeferredLogits) -> bool:
    return any(t.requires_grad for t in logits.recipe.tensors)


_TENSOR: Any = torch.Tensor
_times, _over = _scaled(lambda by: by, torch.mul), _scaled(lambda by: 1.0 / by, torch.div)
_HANDLERS: dict[Any, Callable[..., Any]] = {
    F.cross_entropy: _cross_entropy,
    _TENSOR.float: lambda logits: _cast(logits, torch.float32),
    _TENSOR.double: lambda logits: _cast(logits, torch.float64),
    _TENSOR.to: _to,
    _TENSOR.view: _view,
    _TENSOR.reshape: _view,
    _TENSOR.contiguous: _same,
    _TENSOR.detach: _detach,
    _TENSOR.__getitem__: _getitem,
    _TENSOR.requires_grad.__get__: _requires_grad,
    **dict.fromkeys((_TENSOR.mul, _TENSOR.__mul__, _TENSOR.__rmul__, torch.mul), _times),
    **dict.fromkeys((_TENSOR.div, _TENSOR.__truediv__, _TENSOR.true_divide, torch.div), _over),
    **dict.fromkeys((_TENSOR.tanh, torch.tanh), _tanh),
    **dict.fromkeys((_TENSOR.add, _TENSOR.__add__, torch.add), _plus),
}
_METADATA = {
    _TENSOR.size, _TENSOR.dim, _TENSOR.ndimension, _TENSOR.numel, _TENSOR.nelement, _TENSOR.element_size,
    _TENSOR.is_floating_point, _TENSOR.is_complex, _TENSOR.__len__, _TENSOR.__hash__,
    *(getattr(_TENSOR, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu")),
}  # fmt: skip
