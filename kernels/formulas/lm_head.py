"""A linear head, with a low-rank adapter on it if there is one: its products, chunk of tokens by chunk.

    l = linear(x, W, b) + s xa B^T                  xa = x A^T
    dx = dl W + dxa A      dW = dl^T x      db = sum over tokens of dl
    dxa = s dl B           dA = dxa^T x     dB = s dl^T xa

W and b are in base_dtype, A and B in lora_dtype, l is rounded to the wider of the two, as `lora_linear` has it.

Shapes: x (n, H) for the n tokens of a chunk, W (V, H), b (V,), A (R, H), B (V, R), l (n, V), xa (n, R).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from fastlora.kernels.core.numerics import Addend, cast, scaled_product, sum_products

PARAMETERS = ("weight", "bias", "lora_a", "lora_b")
"""The tensors of a head: W, b, A and B above, in the order of the op's schema."""


@dataclass(frozen=True)
class Head:
    """The linear head, cast once: W and b in `base_dtype`, A and B in `lora_dtype`."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None
    scaling: float
    base_dtype: torch.dtype
    lora_dtype: torch.dtype
    logits_dtype: torch.dtype

    @staticmethod
    def of(
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        lora_a: torch.Tensor | None,
        lora_b: torch.Tensor | None,
        scaling: float | None,
        lora_dtype: torch.dtype | None,
        base_dtype: torch.dtype,
        logits_dtype: torch.dtype,
    ) -> Head:
        low = base_dtype if lora_a is None or lora_dtype is None else lora_dtype
        own = weight.to(base_dtype), cast(bias, base_dtype), cast(lora_a, low), cast(lora_b, low)
        return Head(*own, 1.0 if scaling is None else scaling, base_dtype, low, logits_dtype)

    @property
    def sum_dtype(self) -> torch.dtype:
        """What base product and adapter add up in."""
        return torch.promote_types(self.base_dtype, self.lora_dtype)

    @property
    def wide(self) -> torch.dtype:
        """What the loss is computed in."""
        return torch.promote_types(self.logits_dtype, torch.float32)

    def project(self, x: torch.Tensor) -> torch.Tensor | None:
        """xa, of an adapter."""
        return None if self.lora_a is None else F.linear(x.to(self.lora_dtype), self.lora_a)

    def logits(self, x: torch.Tensor, xa: torch.Tensor | None) -> torch.Tensor:
        """The head's output, as `logits_dtype` has it."""
        base = F.linear(x.to(self.base_dtype), self.weight, self.bias)
        if xa is not None and self.lora_b is not None:
            base = base + F.linear(xa, self.lora_b) * self.scaling
        return base.to(self.logits_dtype)

    def unproject(self, dl: torch.Tensor) -> torch.Tensor | None:
        """dxa, of an adapter."""
        return None if self.lora_b is None else scaled_product(dl.to(self.lora_dtype), self.lora_b, self.scaling)

    def input_gradient(self, dl: torch.Tensor, dxa: torch.Tensor | None) -> torch.Tensor:
        addends: list[Addend] = [(dl.to(self.base_dtype), self.weight)]
        if dxa is not None and self.lora_a is not None:
            addends.append((dxa, self.lora_a))
        return sum_products(addends, self.sum_dtype)


def made_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the sum over tokens for a parameter is kept in: not in float16, which it may leave before it is divided."""
    return torch.float32 if dtype is torch.float16 else dtype


def accumulate(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, beta: float = 1.0, alpha: float = 1.0
) -> None:
    """total = beta * total + alpha * left @ right, in place, with sums in total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=beta, alpha=alpha)
    elif total.is_cuda and total.dtype is torch.float32:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, alpha=alpha, out=total)  # type: ignore[call-overload]
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=beta, alpha=alpha)


class Sums:
    """The gradients of parameters as they add up over chunks."""

    def __init__(self, head: Head, totals: dict[str, torch.Tensor]) -> None:
        self.totals, self._head, self._beta = totals, head, 0.0

    def add(self, dl: torch.Tensor, dxa: torch.Tensor | None, x: torch.Tensor, xa: torch.Tensor | None) -> None:
        """Adds the share of a chunk: dl (n, V), dxa and xa (n, R), x (n, H)."""
        head, beta, totals = self._head, self._beta, self.totals
        self._beta = 1.0
        if "weight" in totals:
            self.add_weight(totals["weight"], dl.to(head.base_dtype), x.to(head.base_dtype), beta)
        if "bias" in totals:
            share = dl.to(head.base_dtype).sum(0, dtype=totals["bias"].dtype)
            totals["bias"].copy_(totals["bias"] + share if beta else share)
        if "lora_b" in totals and xa is not None:
            accumulate(totals["lora_b"], dl.to(head.lora_dtype).t(), xa, beta, head.scaling)
        if "lora_a" in totals and dxa is not None:
            accumulate(totals["lora_a"], dxa.t(), x.to(head.lora_dtype), beta)

    def add_weight(self, total: torch.Tensor, dl: torch.Tensor, x: torch.Tensor, beta: float) -> None:
        accumulate(total, dl.t(), x, beta)
