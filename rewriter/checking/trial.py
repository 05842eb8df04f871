"""Repeat one training step, and keep nothing of it but the loss and the gradients.

Copies stand in for trained parameters and for buffers while the step runs. The user's tensors are never written to and
get no gradient, no hook of an optimizer or of a distributed reducer fires, and a step in float64 needs no copy of the
modules.

A trained parameter that is all zeros, such as LoRA's B at the start, is filled with small random numbers. With zeros,
A would have no gradient, and an error in the product with A would not show.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlora.checking.untouched import containers, holders, untouched
from fastlora.compat.dispatch import tree_map
from fastlora.compat.modules import Dropout, compiled_call, run_experts_one_by_one, set_compiled_call
from fastlora.errors import FastLoRAError
from fastlora.frontend.arguments import require_module

Slots = dict[nn.Module, Any]
LossOf = Callable[[Any], torch.Tensor]

_SCALE = 1024.0
"""Factor on the loss where a model computes in float16, in which small gradients become zero otherwise."""
_SPREAD = 0.02
"""Standard deviation of the numbers that replace zeros."""
_SHAKE = 1 / 16
"""Largest relative change of a parameter in a shaken step, which has other roundings than the step itself."""
_WEIGHTS = 16 << 20
"""Bytes from which integers are taken for quantized weights, which nothing writes to and no copy has room for."""


class NoLossError(FastLoRAError):
    """The model returned no loss for the batch."""


class NotExactError(Exception):
    """The model cannot run in float64; the message says why."""


@dataclass(frozen=True)
class Step:
    """The loss of a training step, and the gradient of every trained parameter that got one."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


class Trial:
    """A training step of a model on one batch, which can be repeated.

    Args:
        model: the model. It is restored after each step.
        args, kwargs: the arguments of its forward. Each step gets copies.
        loss_fn: computes the loss from the output of the model; None to take the loss that the output holds.
        others: further objects whose attributes are restored after each step.

    Attributes:
        dtypes: the floating-point dtypes that the model computes in.
        notes: how these steps differ from those in training.

    Raises:
        FastLoRAError: if the model is wrapped for data parallelism, is sharded, or has no weights yet.
    """

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        loss_fn: LossOf | None = None,
        others: tuple[object, ...] = (),
    ) -> None:
        _refuse(model)
        self.model, self._args, self._kwargs, self._loss_fn, self._others = model, args, kwargs, loss_fn, others
        self.dtypes = dtypes_of(model)
        self._scale = _SCALE if torch.float16 in self.dtypes else 1.0
        self._drops = all(p.device.type == "cpu" for p in model.parameters())
        self.notes = self._notes()

    def step(self, slots: Slots, *, exact: bool = False, shaken: int = 0) -> Step:
        """Take the step.

        Args:
            slots: what fastlora has in the compiled-call slots during the step; empty for an eager step.
            exact: run in float64.
            shaken: seed of a small change of all trained parameters; 0 for none.

        Raises:
            NoLossError: if the model returns no loss, or one that needs no gradient.
            NotExactError: if `exact` is set and a parameter cannot be cast to float64.
        """
        try:
            return self._step(slots, exact, shaken, alone=True)
        except RuntimeError as problem:
            if "use_reentrant" not in str(problem):  # a reentrant checkpoint refuses a backward with `inputs`
                raise
        return self._step(slots, exact, shaken, alone=False)

    def _step(self, slots: Slots, exact: bool, shaken: int, alone: bool) -> Step:
        """Take the step; `alone` accumulates gradients in the model's trained parameters and nowhere else."""
        with untouched(self.model, *self._others), torch.enable_grad(), _autocast(self.model, enabled=not exact):
            put_slots(self.model, slots)
            if not self._drops:
                _stop_dropping(self.model)
            if exact:
                _run_experts_apart(self.model)
            leaves = _put_stand_ins(self.model, exact, shaken)
            args, kwargs = tree_map(lambda value: _copied(value, exact), (self._args, self._kwargs))
            loss = _loss_of(self.model(*args, **kwargs), self._loss_fn)
            (loss * self._scale).backward(inputs=list(leaves.values()) if alone else None)
            gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return Step(loss.detach(), gradients)

    def _notes(self) -> list[str]:
        notes = []
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if zeros := sum(_is_zero(p) for p in trained):
            notes.append(f"{zeros} trained parameters are all zeros; small random numbers took their place")
        if not self._drops and any(True for _ in _dropouts(self.model)):
            notes.append("all dropout probabilities were 0: on a GPU, eager and fastlora draw different masks")
        return notes


def slots_of(model: nn.Module) -> Slots:
    """Return what fastlora has in the compiled-call slots of a model."""
    return {module: slot for module in model.modules() if _is_ours(slot := compiled_call(module))}


def put_slots(model: nn.Module, slots: Slots) -> None:
    """Replace what fastlora has in the compiled-call slots of a model; slots that others have filled stay."""
    for module in model.modules():
        if module in slots or _is_ours(compiled_call(module)):
            set_compiled_call(module, slots.get(module))


def dtypes_of(model: nn.Module) -> set[torch.dtype]:
    """Return the floating-point dtypes of the parameters, of each layer's `compute_dtype`, and of ambient autocast."""
    found: set[Any] = {p.dtype for p in model.parameters()} | {
        getattr(m, "compute_dtype", None) for m in model.modules()
    }
    kinds = {p.device.type for p in model.parameters()}
    found |= {torch.get_autocast_dtype(kind) for kind in kinds if torch.is_autocast_enabled(kind)}
    return found & {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def bytes_in_float64(model: nn.Module, kind: str) -> int:
    """Return the bytes that parameters and buffers on a kind of device take in float64."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(8 * t.numel() for t in tensors if t.device.type == kind and t.is_floating_point())


def _refuse(model: nn.Module) -> None:
    """Raise for what cannot be checked: replaced parameters would confuse the bookkeeping of wrappers and shards."""
    require_module(model, "check")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise FastLoRAError(f"model is a {type(model).__name__}: check the model itself, model.module")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise FastLoRAError(f"{name} is on the meta device: load the weights first")
        if parameter.requires_grad and type(parameter) is not nn.Parameter:
            kind = type(parameter).__name__
            raise FastLoRAError(f"{name} is a {kind}, not a plain parameter: check the model before it is sharded")


def _is_ours(slot: Any) -> bool:
    return type(slot).__module__.startswith("fastlora.")


def _is_zero(parameter: torch.Tensor) -> bool:
    return not parameter.detach().any()


@contextmanager
def _autocast(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Keep ambient autocast as it is, or switch it off."""
    kinds = {p.device.type for p in model.parameters()} & {"cpu", "cuda"}
    before = {kind: torch.is_autocast_enabled(kind) for kind in kinds}
    try:
        for kind in kinds:
            torch.set_autocast_enabled(kind, enabled and before[kind])
        yield
    finally:
        for kind, was in before.items():
            torch.set_autocast_enabled(kind, was)


def _put_stand_ins(model: nn.Module, exact: bool, shaken: int) -> dict[str, nn.Parameter]:
    """Put copies in the places of parameters, buffers and other tensors; return those of trained parameters."""
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(shaken)
    stand_ins: dict[int, Any] = {}
    for name, parameter in parameters.items():
        if exact and (type(parameter) is not nn.Parameter or not parameter.is_floating_point()):
            raise NotExactError(f"{name} is a {type(parameter).__name__} of {parameter.dtype}, which cannot be cast")
        if parameter.requires_grad or exact:
            stand_ins[id(parameter)] = _stand_in(parameter, exact, generator if shaken else None)
        if parameter.requires_grad and _is_zero(parameter):
            made = stand_ins[id(parameter)].data
            made.copy_(_SPREAD * torch.randn(made.shape, generator=generator).to(parameter.dtype))
    for place in [place for module in model.modules() for place in containers(module)]:
        for key, value in list(enumerate(place) if isinstance(place, list) else _items(place)):
            if type(value) is torch.Tensor and (value.is_floating_point() or value.nbytes <= _WEIGHTS):
                stand_ins.setdefault(id(value), _copied(value, exact))
            if id(value) in stand_ins:
                place[key] = stand_ins[id(value)]
    return {name: stand_ins[id(p)] for name, p in parameters.items() if p.requires_grad}


def _items(place: Any) -> Any:
    return place.items() if isinstance(place, dict) else ()


def _stand_in(parameter: nn.Parameter, exact: bool, generator: torch.Generator | None) -> nn.Parameter:
    made = nn.Parameter(parameter.detach().double(), parameter.requires_grad) if exact else copy.deepcopy(parameter)
    if generator is not None and parameter.requires_grad:
        # in the parameter's own dtype, so that a step in float64 begins with the same numbers
        factor = 1 + _SHAKE * (2 * torch.rand(parameter.shape, generator=generator) - 1)
        made.data = (parameter.detach() * factor.to(parameter)).to(made.dtype)
    elif exact and made.dtype == parameter.dtype:
        made.data = made.data.clone()
    return made


def _copied(value: Any, exact: bool) -> Any:
    """Copy an argument or a buffer, detached from the graph that it was computed in."""
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    cut = value.detach().clone()
    return (cut.double() if exact and cut.is_floating_point() else cut).requires_grad_(value.requires_grad)


def _loss_of(output: Any, loss_fn: LossOf | None) -> torch.Tensor:
    loss = loss_fn(output) if loss_fn is not None else _found(output)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        source = "loss_fn" if loss_fn is not None else "the model"
        raise NoLossError(f"{source} returned no loss, a tensor of one element: pass labels in the batch, or loss_fn")
    if not loss.requires_grad:
        raise NoLossError("the loss needs no gradient: set requires_grad on the parameters to train")
    return loss.reshape(())


def _found(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


def _dropouts(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the attributes of modules and configurations that are dropout probabilities, as a dict and a name."""
    for holder in holders(model):
        for name, value in vars(holder).items():
            is_one = "drop" in name.lower() or (name == "p" and isinstance(holder, Dropout))
            if is_one and isinstance(value, float) and 0 < value < 1:
                yield vars(holder), name


def _stop_dropping(model: nn.Module) -> None:
    for attributes, name in list(_dropouts(model)):
        attributes[name] = 0.0


def _run_experts_apart(model: nn.Module) -> None:
    """Have transformers multiply by one expert after another: grouped products have no float64."""
    for holder in holders(model):
        run_experts_one_by_one(holder)
