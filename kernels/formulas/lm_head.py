"""The matrix products of a linear head, optionally with a LoRA adapter, for a chunk of tokens.

    l = linear(x, W, b) + s xa B^T                  xa = x A^T
    dx = dl W + dxa A      dW = dl^T x      db = sum over tokens of dl
    dxa = s dl B           dA = dxa^T x     dB = s dl^T xa

W and b are in base_dtype, A and B in lora_dtype, l is rounded to the wider of the two, like in `lora_linear`.

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
    """A linear head's tensors, cast once: W and b to `base_dtype`, A and B to `lora_dtype`."""

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
        """The dtype of the sum of base layer and adapter."""
        return torch.promote_types(self.base_dtype, self.lora_dtype)

    @property
    def wide(self) -> torch.dtype:
        """The dtype that the loss is computed in."""
        return torch.promote_types(self.logits_dtype, torch.float32)

    def down(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return xa; None without an adapter."""
        return None if self.lora_a is None else F.linear(x.to(self.lora_dtype), self.lora_a)

    def logits(self, x: torch.Tensor, xa: torch.Tensor | None) -> torch.Tensor:
        """Return the head's output in `logits_dtype`."""
        base = F.linear(x.to(self.base_dtype), self.weight, self.bias)
        if xa is not None and self.lora_b is not None:
            base = base + F.linear(xa, self.lora_b) * self.scaling
        return base.to(self.logits_dtype)

    def up_gradient(self, dl: torch.Tensor) -> torch.Tensor | None:
        """Return dxa; None without an adapter."""
        return None if self.lora_b is None else scaled_product(dl.to(self.lora_dtype), self.lora_b, self.scaling)

    def input_gradient(self, dl: torch.Tensor, dxa: torch.Tensor | None) -> torch.Tensor:
        addends: list[Addend] = [(dl.to(self.base_dtype), self.weight)]
        if dxa is not None and self.lora_a is not None:
            addends.append((dxa, self.lora_a))
        return sum_products(addends, self.sum_dtype)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a parameter's gradient is saved: not float16, where it may overflow before the mean."""
    return torch.float32 if dtype is torch.float16 else dtype


def accumulate(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, beta: float = 1.0, alpha: float = 1.0
) -> None:
    """Update total = beta * total + alpha * left @ right, in total's dtype."""
    if left.dtype == total.dtype:
        total.addmm_(left, right, beta=beta, alpha=alpha)
    elif total.is_cuda and total.dtype is torch.float32:
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=beta, alpha=alpha, out=total)  # type: ignore[call-overload]
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), beta=beta, alpha=alpha)


class ParameterGradients:
    """Accumulates the gradients of a head's parameters over chunks into `totals`, which the first chunk overwrites."""

    def __init__(self, head: Head, totals: dict[str, torch.Tensor]) -> None:
        self.totals, self._head, self._beta = totals, head, 0.0

    def add(self, dl: torch.Tensor, dxa: torch.Tensor | None, x: torch.Tensor, xa: torch.Tensor | None) -> None:
        """Add the gradients of a chunk: dl (n, V), dxa and xa (n, R), x (n, H)."""
        head, beta, totals = self._head, self._beta, self.totals
        self._beta = 1.0
        if "weight" in totals:
            self.add_weight(totals["weight"], dl.to(head.base_dtype), x.to(head.base_dtype), beta)
        if "bias" in totals:
            db = dl.to(head.base_dtype).sum(0, dtype=totals["bias"].dtype)
            totals["bias"].copy_(totals["bias"] + db if beta else db)
        if "lora_b" in totals and xa is not None:
            accumulate(totals["lora_b"], dl.to(head.lora_dtype).t(), xa, beta, head.scaling)
        if "lora_a" in totals and dxa is not None:
            accumulate(totals["lora_a"], dxa.t(), x.to(head.lora_dtype), beta)

    def add_weight(self, total: torch.Tensor, dl: torch.Tensor, x: torch.Tensor, beta: float) -> None:
        accumulate(total, dl.t(), x, beta)
