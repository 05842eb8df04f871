"""Schemas of ops: their arguments and results, and the flat list of tensors that autograd sees of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Argument:
    """One argument or result of a schema; `type` is its schema type, e.g. `Tensor?[]` or `float`."""

    name: str
    type: str

    @property
    def is_tensor(self) -> bool:
        return self.type.startswith("Tensor")

    @property
    def is_list(self) -> bool:
        return self.type.endswith("[]")

    @property
    def is_optional(self) -> bool:
        return "?" in self.type


def parse(schema: str) -> tuple[tuple[Argument, ...], tuple[Argument, ...]]:
    """Splits `(Tensor x, float eps) -> (Tensor y)` into arguments and results; no defaults, no mutation."""
    if "=" in schema or "!" in schema:
        raise ValueError(f"schema {schema!r}: an op takes every argument explicitly and mutates none")
    sides = [side.strip().removeprefix("(").removesuffix(")") for side in schema.split("->")]
    parsed = []
    for side in sides:
        pairs = [item.rsplit(" ", 1) for item in side.split(",")]
        parsed.append(tuple(Argument(name.strip(), kind.strip()) for kind, name in pairs))
    arguments, results = parsed
    return arguments, results


def flatten(declared: Sequence[Argument], values: Sequence[Any]) -> Iterator[torch.Tensor | None]:
    for argument, value in zip(declared, values, strict=True):
        if argument.is_tensor:
            yield from value if argument.is_list else (value,)


def unflatten(declared: Sequence[Argument], flat: Sequence[Any]) -> list[Any]:
    """Groups flat leaves by argument again: all lists of one op have one length, as they run over the same members."""
    lists = sum(a.is_list for a in declared)
    length = (len(flat) - (len(declared) - lists)) // max(lists, 1)
    leaves = iter(flat)
    return [[next(leaves) for _ in range(length)] if a.is_list else next(leaves) for a in declared]


def leaves(argument: Argument, gradient: Any, wanted: Any) -> list[Any]:
    if not argument.is_list:
        return [gradient]
    return list(gradient) if gradient is not None else [None] * len(wanted)
