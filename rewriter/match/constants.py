"""Checking constants against an op's schema and declared choices."""

from __future__ import annotations

from typing import Any

import torch

from fastlora.errors import suggestion
from fastlora.kernels.core.schema import Argument
from fastlora.kernels.core.semantic_op import SemanticOp

_TYPES: dict[str, tuple[type, ...]] = {
    "float": (float, int, torch.SymFloat, torch.SymInt),
    "int": (int, torch.SymInt),
    "bool": (bool, torch.SymBool),
    "str": (str,),
    "ScalarType": (torch.dtype,),
}


def constant_fault(op: SemanticOp, argument: Argument, value: Any) -> str | None:
    """Return why a constant cannot be the value of an argument, or None if it can."""
    shown = f"{argument.name}={value!r}"
    if value is None:
        return None if argument.is_optional else f"{shown}: {op.name}{op.schema} takes {argument.type}"
    if argument.is_tensor:
        return f"{shown}: {op.name}{op.schema} takes {argument.type}, not a constant: capture it"
    type_name = argument.type.removesuffix("[]").removesuffix("?")
    is_list = isinstance(value, (list, tuple))
    if is_list != argument.is_list or not all(_has_type(each, type_name) for each in (value if is_list else [value])):
        return f"{shown}: {op.name}{op.schema} takes {argument.type}, not {type(value).__name__}"
    allowed = op.choices.get(argument.name)
    if allowed is not None and value not in allowed:
        return f"{shown} is not a valid {argument.name} of {op.name}: {suggestion(value, allowed)}"
    return None


def _has_type(value: Any, type_name: str) -> bool:
    return isinstance(value, _TYPES.get(type_name, (object,))) and (type_name == "bool" or not isinstance(value, bool))
