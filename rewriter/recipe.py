"""What deferred logits are made of, and what is made of them: the logits themselves, or a loss that never has them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastlora.errors import FastLoRAError
from fastlora.kernels.ops import linear_cross_entropy, lora_linear


class Adapter(NamedTuple):
    """A low-rank adapter on the head, as the ops call its parts: scaling * B A, of A (R, H) and B (V, R)."""

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    lora_dtype: torch.dtype


@dataclass(frozen=True)
class Recipe:
    """What the logits are: `linear(hidden, weight, bias)` in `base_dtype`, with an adapter if there is one, times
    `scale`, then, if `squashed`, the tanh of that times `gain`; as `dtype`. `hidden` has the leading dimensions of the
    logits."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    base_dtype: torch.dtype
    dtype: torch.dtype
    adapter: Adapter | None = None
    scale: float = 1.0
    squashed: bool = False
    gain: float = 1.0
    versions: tuple[int, ...] = ()

    def check(self) -> None:
        """Raises if what the logits are made of has been written to since: they can no longer be computed."""
        if self.now() != self.versions:
            raise FastLoRAError(
                "the hidden states or the weights behind deferred logits were modified in place (by an optimizer step, "
                "say) before the logits were used; read them earlier, or use fastlora.compile(..., defer_logits=False)"
            )

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that the logits are computed from."""
        low = () if self.adapter is None else self.adapter[:2]
        return [t for t in (self.hidden, self.weight, self.bias, *low) if t is not None]

    def now(self) -> tuple[int, ...]:
        """The versions of all tensors."""
        return tuple(t._version for t in self.tensors)

    def detached(self) -> Recipe:
        """The same without gradients."""
        bias, low = self.bias, self.adapter
        cut = self.of(
            hidden=self.hidden.detach(), weight=self.weight.detach(), bias=None if bias is None else bias.detach()
        )
        if low is None:
            return cut
        return replace(cut, adapter=low._replace(lora_a=low.lora_a.detach(), lora_b=low.lora_b.detach()))

    def of(self, **parts: torch.Tensor | None) -> Recipe:
        """The same of other tensors, views of these say, as they are now."""
        self.check()
        made = replace(self, **parts)  # type: ignore[arg-type]
        return replace(made, versions=made.now())

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.hidden.shape[:-1], self.weight.shape[0])

    def multiply(self) -> torch.Tensor:
        """The plain product, before anything was done to it."""
        self.check()
        with torch.autocast(self.hidden.device.type, enabled=False):
            if self.adapter is not None:
                adapted: torch.Tensor = lora_linear(
                    x=self.hidden, weight=self.weight, bias=self.bias, base_dtype=self.base_dtype,
                    out_dtype=self.dtype, **self.adapter._asdict(),
                )  # fmt: skip
                return adapted
            bias = None if self.bias is None else self.bias.to(self.base_dtype)
            return F.linear(self.hidden.to(self.base_dtype), self.weight.to(self.base_dtype), bias)

    def cross_entropy(self, labels: torch.Tensor, **options: Any) -> torch.Tensor:
        """The loss, without the logits."""
        self.check()
        scale = self.scale * self.gain if self.squashed else self.scale
        if self.adapter is not None:
            options |= self.adapter._asdict()
        loss: torch.Tensor = linear_cross_entropy(
            x=self.hidden, weight=self.weight, bias=self.bias, labels=labels, scale=scale,
            softcap=self.gain if self.squashed else 0.0, z_loss=0.0, base_dtype=self.base_dtype,
            logits_dtype=self.dtype, **options,
        )  # fmt: skip
        return loss
