"""What an op costs at the least: floating-point operations, and bytes of device memory moved, each byte counted once.

Costs are formulas in the sizes of the op's docstring, T being tokens. M counts the members of a group (heads, for
rotary; experts, for grouped layers), S is 1 if the base weights are trained and else 0 (of 4-bit weights, the size of a
block; of a sum before a norm, 1 if an operand is dropped out), and `b` are the bytes of an activation's element, `w` of
a weight's, `p` of an adapter's. A benchmark compares times with them:

    limit = max(flops / rate, bytes / bandwidth)

for the rate of a large matrix product and the bandwidth of a large copy on the same machine.
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
        """The formulas of `flops` and `bytes` as sympy expressions; every name in them is a positive integer."""
        names = {name: sympy.Symbol(name, positive=True, integer=True) for name in _NAMES}
        return sympy.sympify(self.flops, locals=names), sympy.sympify(self.bytes, locals=names)

    def at(self, sizes: dict[str, int]) -> tuple[float, float]:
        """Operations and bytes for given sizes.

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
    """The work of an op's forward, and of its backward for the gradients that LoRA wants: all but the base weights'."""

    forward: Work
    backward: Work
