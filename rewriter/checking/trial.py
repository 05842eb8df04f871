"""Repeating one training step without changing the model; only the loss and the gradients are kept.

Copies replace trained parameters and buffers while the step runs. So the user's tensors are never written to and get no
gradient, hooks of optimizers and distributed reducers do not run, and a step in float64 needs no copy of the modules.

The copy of a trained parameter that is all zeros, such as LoRA's B at the start, is filled with small random numbers.
With zeros, A would have no gradient, and errors in the product with A would not show.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastlora.checking.preserve_state import containers, modules_and_configs, preserve_state
from fastlora.compat.dispatch import tree_map
from fastlora.compat.modules import Dropout, compiled_call, run_experts_one_by_one, set_compiled_call
from fastlora.errors import FastLoRAError
from fastlora.frontend.arguments import require_module

Slots = dict[nn.Module, Any]
LossOf = Callable[[Any], torch.Tensor]

_LOSS_SCALE = 1024.0
"""Factor on the loss of a model that computes in float16, where small gradients would otherwise become zero."""
_ZERO_REPLACEMENT_STD = 0.02
"""Standard deviation of the numbers that replace zeros."""
_PERTURBATION = 1 / 16
"""Largest relative change of a parameter in a perturbed step, whose roundings then differ."""
_MAX_INTEGERS = 16 << 20
"""Integer tensors of more bytes are assumed to be quantized weights, which are not written to, and are not copied."""


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
        loss_fn: computes the loss from the output of the model; None for the loss in the output.
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
        _refuse_model(model)
        self.model, self._args, self._kwargs, self._loss_fn, self._others = model, args, kwargs, loss_fn, others
        self.dtypes = dtypes_of(model)
        self._scale = _LOSS_SCALE if torch.float16 in self.dtypes else 1.0
        self._keep_dropout = all(p.device.type == "cpu" for p in model.parameters())
        self.notes = self._notes()

    def step(self, slots: Slots, *, exact: bool = False, seed: int = 0) -> Step:
        """Run the step.

        Args:
            slots: fastlora's gates in the compiled-call slots during the step; empty for an eager step.
            exact: whether to run in float64.
            seed: seed of a small perturbation of all trained parameters; 0 for none.

        Raises:
            NoLossError: if the model returns no loss, or one that requires no gradient.
            NotExactError: if `exact` is set and a parameter cannot be cast to float64.
        """
        try:
            return self._step(slots, exact, seed, only_parameters=True)
        except RuntimeError as problem:
            if "use_reentrant" not in str(problem):  # a reentrant checkpoint does not allow a backward with `inputs`
                raise
        return self._step(slots, exact, seed, only_parameters=False)

    def _step(self, slots: Slots, exact: bool, seed: int, only_parameters: bool) -> Step:
        """Run the step; with `only_parameters`, only the model's trained parameters accumulate gradients."""
        with preserve_state(self.model, *self._others), torch.enable_grad(), _autocast(self.model, enabled=not exact):
            put_slots(self.model, slots)
            if not self._keep_dropout:
                _disable_dropout(self.model)
            if exact:
                _run_experts_one_by_one(self.model)
            leaves = _replace_tensors(self.model, exact, seed)
            args, kwargs = tree_map(lambda value: _copy(value, exact), (self._args, self._kwargs))
            loss = _loss_of(self.model(*args, **kwargs), self._loss_fn)
            (loss * self._scale).backward(inputs=list(leaves.values()) if only_parameters else None)
            gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return Step(loss.detach(), gradients)

    def _notes(self) -> list[str]:
        notes = []
        trained = [p for p in self.model.parameters() if p.requires_grad]
        if zeros := sum(_is_zero(p) for p in trained):
            notes.append(f"{zeros} trained parameters are all zeros; small random numbers took their place")
        if not self._keep_dropout and any(True for _ in _dropouts(self.model)):
            notes.append("all dropout probabilities were 0: on a GPU, eager and fastlora draw different masks")
        return notes


def slots_of(model: nn.Module) -> Slots:
    """Return fastlora's gates in the compiled-call slots of a model."""
    return {module: slot for module in model.modules() if _is_gate(slot := compiled_call(module))}


def put_slots(model: nn.Module, slots: Slots) -> None:
    """Replace fastlora's gates in the compiled-call slots of a model; slots with anything else do not change."""
    for module in model.modules():
        if module in slots or _is_gate(compiled_call(module)):
            set_compiled_call(module, slots.get(module))


def dtypes_of(model: nn.Module) -> set[torch.dtype]:
    """Return the floating-point dtypes of the parameters, of each layer's `compute_dtype`, and of enclosing
    autocast."""
    dtypes: set[Any] = {p.dtype for p in model.parameters()}
    dtypes |= {getattr(m, "compute_dtype", None) for m in model.modules()}
    device_types = {p.device.type for p in model.parameters()}
    dtypes |= {torch.get_autocast_dtype(each) for each in device_types if torch.is_autocast_enabled(each)}
    return dtypes & {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def bytes_in_float64(model: nn.Module, device_type: str) -> int:
    """Return the bytes that parameters and buffers on devices of a type take in float64."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(8 * t.numel() for t in tensors if t.device.type == device_type and t.is_floating_point())


def _refuse_model(model: nn.Module) -> None:
    """Raise `FastLoRAError` for models that cannot be checked, such as wrappers and shards, which track parameters."""
    require_module(model, "check")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise FastLoRAError(f"model is a {type(model).__name__}: check the model itself, model.module")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise FastLoRAError(f"{name} is on the meta device: load the weights first")
        if parameter.requires_grad and type(parameter) is not nn.Parameter:
            kind = type(parameter).__name__
            raise FastLoRAError(f"{name} is a {kind}, not a plain parameter: check the model before it is sharded")


def _is_gate(slot: Any) -> bool:
    return type(slot).__module__.startswith("fastlora.")


def _is_zero(parameter: torch.Tensor) -> bool:
    return not parameter.detach().any()


@contextmanager
def _autocast(model: nn.Module, enabled: bool) -> Iterator[None]:
    """Disable enclosing autocast unless `enabled`."""
    device_types = {p.device.type for p in model.parameters()} & {"cpu", "cuda"}
    before = {each: torch.is_autocast_enabled(each) for each in device_types}
    try:
        for device_type in device_types:
            torch.set_autocast_enabled(device_type, enabled and before[device_type])
        yield
    finally:
        for device_type, was_enabled in before.items():
            torch.set_autocast_enabled(device_type, was_enabled)


def _replace_tensors(model: nn.Module, exact: bool, seed: int) -> dict[str, nn.Parameter]:
    """Replace parameters, buffers and other tensors of a model by copies; return those of trained parameters by
    name."""
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    replacements: dict[int, Any] = {}
    for name, parameter in parameters.items():
        if exact and (type(parameter) is not nn.Parameter or not parameter.is_floating_point()):
            raise NotExactError(f"{name} is a {type(parameter).__name__} of {parameter.dtype}, which cannot be cast")
        if parameter.requires_grad or exact:
            replacements[id(parameter)] = _replacement(parameter, exact, generator if seed else None)
        if parameter.requires_grad and _is_zero(parameter):
            data = replacements[id(parameter)].data
            data.copy_(_ZERO_REPLACEMENT_STD * torch.randn(data.shape, generator=generator).to(parameter.dtype))
    for container in [each for module in model.modules() for each in containers(module)]:
        for key, value in list(enumerate(container) if isinstance(container, list) else _items(container)):
            if type(value) is torch.Tensor and (value.is_floating_point() or value.nbytes <= _MAX_INTEGERS):
                replacements.setdefault(id(value), _copy(value, exact))
            if id(value) in replacements:
                container[key] = replacements[id(value)]
    return {name: replacements[id(p)] for name, p in parameters.items() if p.requires_grad}


def _items(container: Any) -> Any:
    return container.items() if isinstance(container, dict) else ()


def _replacement(parameter: nn.Parameter, exact: bool, generator: torch.Generator | None) -> nn.Parameter:
    copied = nn.Parameter(parameter.detach().double(), parameter.requires_grad) if exact else copy.deepcopy(parameter)
    if generator is not None and parameter.requires_grad:
        # computed in the dtype of the parameter, so that a step in float64 starts with the same numbers
        factor = 1 + _PERTURBATION * (2 * torch.rand(parameter.shape, generator=generator) - 1)
        copied.data = (parameter.detach() * factor.to(parameter)).to(copied.dtype)
    elif exact and copied.dtype == parameter.dtype:
        copied.data = copied.data.clone()
    return copied


def _copy(value: Any, exact: bool) -> Any:
    """Copy an argument or a buffer, detached from its autograd graph."""
    if not isinstance(value, torch.Tensor):
        return copy.deepcopy(value)
    copied = value.detach().clone()
    return (copied.double() if exact and copied.is_floating_point() else copied).requires_grad_(value.requires_grad)


def _loss_of(output: Any, loss_fn: LossOf | None) -> torch.Tensor:
    loss = loss_fn(output) if loss_fn is not None else _default_loss(output)
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        source = "loss_fn" if loss_fn is not None else "the model"
        raise NoLossError(f"{source} returned no loss, a tensor of one element: pass labels in the batch, or loss_fn")
    if not loss.requires_grad:
        raise NoLossError("the loss requires no gradient: set requires_grad on the parameters to train")
    return loss.reshape(())


def _default_loss(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output
    return output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)


def _dropouts(model: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield the attributes of modules and configurations that are dropout probabilities, as a dict and a name."""
    for owner in modules_and_configs(model):
        for name, value in vars(owner).items():
            is_dropout = "drop" in name.lower() or (name == "p" and isinstance(owner, Dropout))
            if is_dropout and isinstance(value, float) and 0 < value < 1:
                yield vars(owner), name


def _disable_dropout(model: nn.Module) -> None:
    for attributes, name in list(_dropouts(model)):
        attributes[name] = 0.0


def _run_experts_one_by_one(model: nn.Module) -> None:
    """Make transformers loop over experts, as grouped products do not support float64."""
    for each in modules_and_configs(model):
        run_experts_one_by_one(each)
