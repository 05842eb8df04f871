"""Schemas of ops: their arguments and results, and the flat lists of their tensors that autograd takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch


@dataclass(frozen=True)
class Argument:
    """One argument or result of a schema; `type` is its schema type, e.g. `Tensor?[]` or `float`."""

    name: str
    type: str

    @cached_property
    def is_tensor(self) -> bool:
        return self.type.startswith("Tensor")

    @cached_property
    def is_list(self) -> bool:
        return self.type.endswith("[]")

    @cached_property
    def is_optional(self) -> bool:
        return "?" in self.type


def parse(schema: str) -> tuple[tuple[Argument, ...], tuple[Argument, ...]]:
    """Parse `(Tensor x, float eps) -> (Tensor y)` into arguments and results.

    Raises:
        ValueError: for defaults or mutated arguments.
    """
    if "=" in schema or "!" in schema:
        raise ValueError(f"schema {schema!r}: an op takes every argument explicitly and mutates none")
    sides = [side.strip().removeprefix("(").removesuffix(")") for side in schema.split("->")]
    parsed = []
    for side in sides:
        pairs = [item.rsplit(" ", 1) for item in side.split(",")]
        parsed.append(tuple(Argument(name.strip(), kind.strip()) for kind, name in pairs))
    arguments, results = parsed
    return arguments, results


class Leaves:
    """Converts between the values of declared arguments and the flat list of their tensors, "leaves", that autograd
    takes."""

    def __init__(self, declared: Sequence[Argument]) -> None:
        self.tensors = tuple(a for a in declared if a.is_tensor)
        self.names = tuple(a.name for a in self.tensors)
        self._at = [i for i, a in enumerate(declared) if a.is_tensor]
        self._are_lists = [a.is_list for a in self.tensors]
        self._lists = sum(self._are_lists)

    def flat(self, values: Sequence[Any]) -> list[torch.Tensor | None]:
        """Return the leaves of all declared `values`, in order."""
        if not self._lists:
            return [values[i] for i in self._at]
        return [leaf for i, many in zip(self._at, self._are_lists, strict=True) for leaf in _leaves(values[i], many)]

    def grouped(self, flat: Sequence[Any]) -> list[Any]:
        """Group leaves by tensor argument; all lists of an op have the same length, that of its group."""
        if not self._lists:
            return list(flat)
        length = (len(flat) - (len(self.tensors) - self._lists)) // self._lists
        leaves = iter(flat)
        return [[next(leaves) for _ in range(length)] if many else next(leaves) for many in self._are_lists]

    def named(self, flat: Sequence[Any]) -> dict[str, Any]:
        """Group leaves by tensor argument, by name."""
        return dict(zip(self.names, self.grouped(flat), strict=True))

    def flat_gradients(self, gradients: dict[str, Any], wanted: dict[str, Any]) -> list[Any]:
        """Flatten the gradients that a backward returns by name; missing ones, and members of missing lists, are
        None."""
        if not self._lists:
            return [gradients.get(name) for name in self.names]
        found = [gradients.get(name) for name in self.names]
        return [
            leaf
            for name, gradient, many in zip(self.names, found, self._are_lists, strict=True)
            for leaf in _leaves([None] * len(wanted[name]) if many and gradient is None else gradient, many)
        ]


def _leaves(value: Any, many: bool) -> Sequence[Any]:
    return value if many else (value,)
