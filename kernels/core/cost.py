"""The minimum cost of an op: floating-point operations, and bytes of device memory moved, each byte counted once.

Costs are formulas in the sizes of the op's docstring, with T tokens. M is the number of members of a group (heads for
rotary, experts for grouped layers). S is 1 if the base weights are trained, otherwise 0; for 4-bit weights it is the
block size, for a sum before a norm it is 1 if an operand has dropout. An element of an activation has `b` bytes, of a
weight `w`, of an adapter `p`. Benchmarks compare times with

    limit = max(flops / rate, bytes / bandwidth)

where rate is that of a large matrix product and bandwidth that of a large copy on the same machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import sympy


@dataclass(frozen=True)
class Work:
    """Operations and bytes of one pass, as formulas."""

    flops: str
    bytes: str

    @cached_property
    def expressions(self) -> tuple[sympy.Expr, sympy.Expr]:
        """The formulas of `flops` and `bytes` as sympy expressions in positive integers."""
        names = {name: sympy.Symbol(name, positive=True, integer=True) for name in _NAMES}
        return sympy.sympify(self.flops, locals=names), sympy.sympify(self.bytes, locals=names)

    def at(self, sizes: dict[str, int]) -> tuple[float, float]:
        """Return operations and bytes for given sizes.

        Raises:
            ValueError: if a size is missing.
        """
        values = {sympy.Symbol(name, positive=True, integer=True): value for name, value in sizes.items()}
        found = [expression.subs(values) for expression in self.expressions]
        missing = sorted(str(s) for expression in found for s in expression.free_symbols)
        if missing:
            raise ValueError(f"sizes: {', '.join(dict.fromkeys(missing))} missing, got {sorted(sizes)}")
        flops, moved = (float(expression) for expression in found)
        return flops, moved


_NAMES = ("T", "H", "I", "K", "N", "R", "V", "D", "M", "S", "b", "w", "p")


@dataclass(frozen=True)
class Cost:
    """The work of an op's forward, and of its backward for LoRA: all gradients but those of base weights."""

    forward: Work
    backward: Work
