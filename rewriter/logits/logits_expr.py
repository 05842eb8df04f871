"""A lazily evaluated expression of the logits, which returns the logits or the arguments of a loss that needs none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from fastlora.errors import FastLoRAError
from fastlora.kernels.ops import linear_cross_entropy, lora_linear


class Adapter(NamedTuple):
    """A LoRA adapter on the head, by the argument names of the ops: scaling * B A, with A (R, H) and B (V, R)."""

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scaling: float
    lora_dtype: torch.dtype


@dataclass(frozen=True)
class LogitsExpr:
    """The expression `scale * linear(hidden, weight, bias)`, or `softcap * tanh(...)` of it if `has_tanh`.

    All tensors are detached.

    Attributes:
        hidden: hidden states (..., H), with the leading dimensions of the logits.
        weight: (V, H).
        bias: (V,), or None.
        base_dtype: the dtype in which the linear layer computes.
        dtype: the dtype of the logits.
        adapter: a LoRA adapter that is added to the linear layer, if there is one.
        requires_grad: the tensors that require a gradient, by the argument names of the ops.
    """

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    base_dtype: torch.dtype
    dtype: torch.dtype
    adapter: Adapter | None = None
    requires_grad: frozenset[str] = frozenset()
    scale: float = 1.0
    has_tanh: bool = False
    softcap: float = 1.0

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All tensors that the logits are computed from."""
        matrices = () if self.adapter is None else self.adapter[:2]
        return [t for t in (self.hidden, self.weight, self.bias, *matrices) if t is not None]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.hidden.shape[:-1], self.weight.shape[0])

    @property
    def is_linear_output(self) -> bool:
        """Whether the logits are rows of the linear layer's output, without a scale, a cast or tanh."""
        return self.dtype is self.base_dtype and self.scale == 1.0 and not self.has_tanh

    def scaled(self, factor: float) -> LogitsExpr:
        if self.has_tanh:
            return replace(self, softcap=self.softcap * factor)
        return replace(self, scale=self.scale * factor)

    def linear_output(self) -> torch.Tensor:
        """Return the output of the linear layer and its adapter (..., V)."""
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
        """Return the logits (..., V) in `dtype`."""
        z = self.linear_output().to(self.dtype) * self.scale
        return torch.tanh(z) * self.softcap if self.has_tanh else z

    def loss_arguments(self, labels: torch.Tensor, dtype: torch.dtype, **options: Any) -> list[Any]:
        """Return the arguments of `linear_cross_entropy`, in its order, for a loss that reads the logits as `dtype`."""
        scale = self.scale * self.softcap if self.has_tanh else self.scale
        if self.adapter is not None:
            options |= self.adapter._asdict()
        return linear_cross_entropy.order({
            "x": self.hidden, "weight": self.weight, "bias": self.bias, "labels": labels, "scale": scale,
            "softcap": self.softcap if self.has_tanh else 0.0, "z_loss": 0.0, "base_dtype": self.base_dtype,
            "logits_dtype": dtype, **options,
        })  # fmt: skip


class Snapshot:
    """Records the state of tensors, to detect in-place writes before they are read.

    PyTorch's version counters see writes by its own operations. Other writes (`.data`, a custom kernel, FSDP that
    gathers new weights into the same memory) are detected by comparing a sample of the elements, which synchronizes
    with the device.

    Attributes:
        taken_at: `DeferralStats.call_counts()` when the snapshot was taken.
    """

    def __init__(self, tensors: list[torch.Tensor], taken_at: tuple[int, int] | None = None) -> None:
        self._tensors, self._versions = tensors, [t._version for t in tensors]
        self._samples = [_sample(t) for t in tensors]
        self.taken_at = taken_at

    def with_tensor(self, t: torch.Tensor) -> Snapshot:
        """Return a snapshot that has one more tensor."""
        made = Snapshot([], self.taken_at)
        made._tensors, made._versions = [*self._tensors, t], [*self._versions, t._version]
        made._samples = [*self._samples, _sample(t)]
        return made

    def problem(self, check_values: bool) -> str | None:
        """Return why the tensors can no longer be read, or None if they can.

        Args:
            check_values: whether to compare samples of the elements as well.
        """
        if any(t.untyped_storage().size() == 0 and t.numel() for t in self._tensors):
            return (
                "the weights behind deferred logits were freed before the logits or their gradient were used; use "
                "fastlora.compile(..., defer_logits=False)"
            )
        is_written = self._versions != [t._version for t in self._tensors]
        pairs = zip(self._samples, self._tensors, strict=True)
        if is_written or (check_values and not all(_equal(sample, _sample(t)) for sample, t in pairs)):
            return (
                "the hidden states or the weights behind deferred logits were modified in place (by an optimizer step, "
                "say) before the logits or their gradient were used; read them earlier, or use "
                "fastlora.compile(..., defer_logits=False)"
            )
        return None

    def check(self, check_values: bool) -> None:
        """Raise `FastLoRAError` if the tensors can no longer be read."""
        if (problem := self.problem(check_values)) is not None:
            raise FastLoRAError(problem)


def _equal(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Return whether two samples are equal, where nan equals nan."""
    return bool(((left == right) | ((left != left) & (right != right))).all())


def _sample(t: torch.Tensor) -> torch.Tensor:
    """Return up to 256 elements, spread over the tensor."""
    if not t.is_contiguous():
        t = t.detach()[..., 0].reshape(-1)
    step = max(1, t.numel() // 255)
    return t.detach().as_strided((t.numel() // step,), (step,)).clone()
