"""What deferred logits are computed from: as logits, or as a loss that never has them."""

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
    `scale`, then, if `squashed`, the tanh of that times `gain`; as `dtype`.

    All tensors are detached. `hidden` has the leading dimensions of the logits. `trained` has the names of the tensors,
    as the ops call them, that want a gradient.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    base_dtype: torch.dtype
    dtype: torch.dtype
    adapter: Adapter | None = None
    trained: frozenset[str] = frozenset()
    scale: float = 1.0
    squashed: bool = False
    gain: float = 1.0

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that the logits are computed from."""
        low = () if self.adapter is None else self.adapter[:2]
        return [t for t in (self.hidden, self.weight, self.bias, *low) if t is not None]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.hidden.shape[:-1], self.weight.shape[0])

    @property
    def is_product(self) -> bool:
        """Whether nothing but rows has changed since the product."""
        return self.dtype is self.base_dtype and self.scale == 1.0 and not self.squashed

    def scaled(self, factor: float) -> Recipe:
        if self.squashed:
            return replace(self, gain=self.gain * factor)
        return replace(self, scale=self.scale * factor)

    def product(self) -> torch.Tensor:
        """Return the head's output, before anything was done to it."""
        with torch.autocast(self.hidden.device.type, enabled=False):
            if self.adapter is not None:
                adapted: torch.Tensor = lora_linear(
                    x=self.hidden, weight=self.weight, bias=self.bias, base_dtype=self.base_dtype,
                    out_dtype=self.dtype, **self.adapter._asdict(),
                )  # fmt: skip
                return adapted
            bias = None if self.bias is None else self.bias.to(self.base_dtype)
            return F.linear(self.hidden.to(self.base_dtype), self.weight.to(self.base_dtype), bias)

    def logits(self) -> torch.Tensor:
        """Return the logits."""
        z = self.product().to(self.dtype) * self.scale
        return torch.tanh(z) * self.gain if self.squashed else z

    def loss_arguments(self, labels: torch.Tensor, dtype: torch.dtype, **options: Any) -> list[Any]:
        """Return the arguments of `linear_cross_entropy`, in its order, for logits that the loss reads as `dtype`."""
        scale = self.scale * self.gain if self.squashed else self.scale
        if self.adapter is not None:
            options |= self.adapter._asdict()
        return linear_cross_entropy.order({
            "x": self.hidden, "weight": self.weight, "bias": self.bias, "labels": labels, "scale": scale,
            "softcap": self.gain if self.squashed else 0.0, "z_loss": 0.0, "base_dtype": self.base_dtype,
            "logits_dtype": dtype, **options,
        })  # fmt: skip


class Snapshot:
    """Tensors as they are now, which must not be written to before they are read.

    PyTorch counts writes by its operations. Those past them (`.data`, a kernel of somebody's own, FSDP that gathers
    new weights into the same memory) are looked for in a sample of the elements, for which the host waits. `moment`
    tells when the tensors were as they are.
    """

    def __init__(self, tensors: list[torch.Tensor], moment: tuple[int, int] | None = None) -> None:
        self._tensors, self._versions = tensors, [t._version for t in tensors]
        self._samples = [_sample(t) for t in tensors]
        self.moment = moment

    def and_of(self, t: torch.Tensor) -> Snapshot:
        """Return a snapshot that has one more tensor."""
        made = Snapshot([], self.moment)
        made._tensors, made._versions = [*self._tensors, t], [*self._versions, t._version]
        made._samples = [*self._samples, _sample(t)]
        return made

    def problem(self, look: bool) -> str | None:
        """Return why the tensors can no longer be read, None if they can; `look` at elements as well."""
        if any(t.untyped_storage().size() == 0 and t.numel() for t in self._tensors):
            return (
                "the weights behind deferred logits were freed before the logits or their gradient were used; use "
                "fastlora.compile(..., defer_logits=False)"
            )
        counted = self._versions != [t._version for t in self._tensors]
        pairs = zip(self._samples, self._tensors, strict=True)
        if counted or (look and not all(_alike(mine, _sample(t)) for mine, t in pairs)):
            return (
                "the hidden states or the weights behind deferred logits were modified in place (by an optimizer step, "
                "say) before the logits or their gradient were used; read them earlier, or use "
                "fastlora.compile(..., defer_logits=False)"
            )
        return None

    def check(self, look: bool) -> None:
        """Raise if the tensors can no longer be read."""
        if (problem := self.problem(look)) is not None:
            raise FastLoRAError(problem)


def _alike(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two samples are equal, nan for nan."""
    return bool(((left == right) | ((left != left) & (right != right))).all())


def _sample(t: torch.Tensor) -> torch.Tensor:
    """Return up to 256 elements, spread over the tensor."""
    if not t.is_contiguous():
        t = t.detach()[..., 0].reshape(-1)
    step = max(1, t.numel() // 255)
    return t.detach().as_strided((t.numel() // step,), (step,)).clone()
