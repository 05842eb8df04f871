"""Checks of the arguments of public functions; each error names the argument, its value and the remedy."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastlora.compat.dynamo import OptimizedModule
from fastlora.errors import FastLoRAError


def require_module(model: Any, function: str) -> None:
    """Raise `FastLoRAError` unless `model` is an `nn.Module` that can be traced.

    Args:
        model: the argument that was passed.
        function: the name of the public function, for the message.
    """
    if not isinstance(model, nn.Module):
        raise FastLoRAError(f"model must be an nn.Module; got a {type(model).__name__}")
    if isinstance(model, OptimizedModule):
        raise FastLoRAError(f"model comes from torch.compile: pass its module, fastlora.{function}(model._orig_mod)")
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            which = f"the module {name!r} of model" if name else "model"
            raise FastLoRAError(f"{which} is a TorchScript module, which cannot be traced: use what it was made of")


def require_keywords(batch: tuple[Any, ...], function: str) -> None:
    """Raise `FastLoRAError` if the arguments of the model's forward were passed by position."""
    if batch:
        given = ", ".join(type(each).__name__ for each in batch)
        raise FastLoRAError(
            f"{function} takes the arguments of the model's forward by name, fastlora.{function}(model, **batch); got "
            f"{given} by position"
        )
