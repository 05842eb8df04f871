"""Linear head and cross-entropy, fused: logits are only materialized for a chunk of tokens at a time.

    l = linear(x, W, b) [+ s (x A^T) B^T]           the head, optionally with a LoRA adapter
    l = l.to(logits_dtype) * scale
    z = softcap * tanh(l / softcap)                 no softcap: z = l
    lse = log(sum over v of exp(z_v))
    loss_t = (1 - e) * (lse - z_y) + e * (lse - mean over v of z_v) + c * lse^2

with e = label_smoothing, c = z_loss and y the label of t; 0 where y is `ignore_index`.  The result is the sum over
tokens, or the mean over those not ignored (nan if there is none), or loss_t without a reduction.

Backward, with g_t the gradient of loss_t (dloss, divided by the count for the mean, 0 for ignored tokens) and p the
softmax of z:

    dz_v = g_t * (p_v * (1 + 2 c lse) - (1 - e) * [v = y] - e / V)
    dl_v = dz_v * (1 - tanh(l_v / softcap)^2) * scale
    dx = dl W + dxa A      dW = dl^T x      db = sum over tokens of dl
    dxa = s dl B           dA = dxa^T x     dB = s dl^T xa                  xa = x A^T

because the gradient of lse is p.  In each product dl is cast to the other operand's dtype, like in autograd, and sums
over tokens are in float32 or wider.

All of this is linear in g_t, so the forward computes the needed gradients while it has the logits, as if the gradient
of its result were 1, and the backward multiplies them by the actual one: the head's largest product is computed once,
and nothing is rounded twice if the gradient is 1.  In float16 dl is computed for g_t = `fp16_loss_scale` instead, so
that small probabilities do not underflow in a mean over many tokens.  The unreduced loss has a g_t per token, which
sums over tokens would need in the forward: there the forward computes only dx, and the backward recomputes the logits
if gradients of parameters are needed.

Saved: the computed gradients, `grad_*` (empty if not computed), the labels and the count of kept tokens; for the
unreduced loss with trained parameters, the inputs.

A chunk has as many tokens as `CHUNK_BYTES` hold rows of logits; results depend on the chunk size only by rounding.
Ignored tokens take part in no product, so an inf or nan in them does not spread.  (On a GPU the PyTorch implementation,
which cannot know their number without a synchronization, multiplies zeros instead.)

Shapes: x (..., H) with T tokens, W (V, H), b (V,), A (R, H), B (V, R), labels T entries; loss () or, unreduced, (T,).
Sources: first principles; the gradient in the forward as in Hsu et al., "Liger Kernel" (2024), chunks as there and in
Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models" (2024), the z-loss as in Chowdhery et al., "PaLM"
(2022), the adapter as in `lora_linear`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from fastlora.compat.calls import is_fake
from fastlora.kernels.core.cost import Cost, Work
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.library import register_op
from fastlora.kernels.core.numerics import cast
from fastlora.kernels.core.semantic_op import Policy
from fastlora.kernels.formulas.lm_head import PARAMETERS, Head, ParameterGradients, gradient_dtype
from fastlora.kernels.formulas.token_loss import Loss, cap, logits_gradient, token_loss

CHUNK_BYTES = 64 << 20
REDUCTIONS = ("mean", "sum", "none")


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scaling: float | None,
    lora_dtype: torch.dtype | None,
    scale: float,
    softcap: float,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
    base_dtype: torch.dtype,
    logits_dtype: torch.dtype,
) -> torch.Tensor:
    """Compute head and loss as models do, with all logits at once. Return the loss in `logits_dtype`."""
    logits = F.linear(x.to(base_dtype), weight.to(base_dtype), cast(bias, base_dtype))
    if lora_a is not None and lora_b is not None:
        dtype = lora_dtype or base_dtype
        low = F.linear(F.linear(x.to(dtype), lora_a.to(dtype)), lora_b.to(dtype))
        logits = logits + low * (1.0 if scaling is None else scaling)
    logits = logits.to(logits_dtype) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    logits, labels = logits.reshape(-1, weight.shape[0]), labels.reshape(-1)
    loss = F.cross_entropy(
        logits, labels, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    if z_loss == 0:
        return loss
    extra = (z_loss * logits.logsumexp(-1).square()).masked_fill(labels == ignore_index, 0)
    if reduction == "none":
        return loss + extra
    return loss + (extra.sum() / (labels != ignore_index).sum() if reduction == "mean" else extra.sum())


def chunk_rows(vocabulary: int, logit_bytes: int, budget: int) -> int:
    """Return how many tokens a chunk has."""
    return max(1, budget // (logit_bytes * vocabulary))


def chunks(tokens: int, rows: int) -> Iterator[slice]:
    """Yield slices of up to `rows` tokens; a single empty one if there are no tokens."""
    for start in range(0, max(tokens, 1), rows):
        yield slice(start, min(start + rows, tokens))


def recomputes(wanted: Wanted, given: dict[str, Any]) -> bool:
    """Return whether the backward has to recompute the logits."""
    return given["reduction"] == "none" and any(wanted[name] for name in PARAMETERS)


def fp16_loss_scale(scale: float, *dtypes: torch.dtype | None) -> float | None:
    """Return the gradient of each loss that the forward assumes if dl may be float16, where probabilities below 6e-8
    underflow: a power of two, so that it causes no rounding. Return None for other dtypes."""
    if torch.float16 not in dtypes:
        return None
    return 2.0 ** (3 - math.ceil(math.log2(max(abs(scale), 1.0))))


def assumed_grad(count: torch.Tensor, reduction: str, fp16_scale: float | None, dtype: torch.dtype) -> torch.Tensor:
    """Return the gradient of each loss that the forward assumes: `fp16_scale`, or that for an op's gradient of 1."""
    one = count.new_full((), 1.0 if fp16_scale is None else fp16_scale, dtype=dtype)
    return one / count.clamp(min=1) if reduction == "mean" and fp16_scale is None else one


@dataclass(frozen=True)
class Problem:
    """The inputs of the chunked computation of losses and gradients.

    Attributes:
        x: (..., H) with T tokens.
        targets: the labels (T,).
        head, loss: the cast head, and the options of the loss.
        names: the arguments whose gradients are needed.
        parameters: the head's parameters by name.
        g: the gradient of each token's loss, () or (T,).
    """

    x: torch.Tensor
    targets: torch.Tensor
    head: Head
    loss: Loss
    names: tuple[str, ...]
    parameters: dict[str, torch.Tensor]
    g: torch.Tensor

    def needs_grad(self, name: str) -> bool:
        return name in self.names


Solution = tuple[torch.Tensor, Gradients]
"""The losses (T,), and gradients by name; those of parameters are in the dtype in which they were summed."""


def compute(problem: Problem) -> Solution:
    """Compute losses and gradients chunk by chunk in PyTorch."""
    x, targets, head, loss, g = problem.x, problem.targets, problem.head, problem.loss, problem.g
    tokens, kept = x.reshape(-1, x.shape[-1]), targets != loss.ignore_index
    can_select = x.device.type == "cpu" and not is_fake(x)
    index = kept.nonzero()[:, 0] if can_select else torch.arange(tokens.shape[0], device=x.device)
    rows = chunk_rows(head.weight.shape[0], head.wide.itemsize, CHUNK_BYTES)
    losses = tokens.new_zeros(tokens.shape[0], dtype=head.wide)
    dx = tokens.new_zeros(tokens.shape, dtype=head.sum_dtype) if problem.needs_grad("x") else None
    trained = {n: p for n, p in problem.parameters.items() if problem.needs_grad(n)}
    totals = {n: torch.empty_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in trained.items()}
    sums = ParameterGradients(head, totals)
    for chunk in [slice(None)] if is_fake(x) else chunks(index.shape[0], rows):
        at = index[chunk]
        part = tokens[at] if can_select else tokens[at].masked_fill(~kept[at][:, None], 0)
        xa = head.down(part)
        z, t = cap(head.logits(part, xa).to(head.wide), loss)
        losses[at], peak, log_sum = token_loss(z, targets[at], loss)
        if problem.names:
            chunk_g = g[at] if g.dim() else g
            dl = logits_gradient(z, t, peak, log_sum, targets[at], chunk_g, loss).to(head.sum_dtype)
            dxa = head.up_gradient(dl)
            sums.add(dl, dxa, part, xa)
            if dx is not None:
                dx[at] = head.input_gradient(dl, dxa)
    return losses, sums.totals | ({} if dx is None else {"x": dx.reshape(x.shape)})


@dataclass(frozen=True)
class KeptRows:
    """The labels (T,) and the ignored one, from which the rows of kept tokens follow."""

    labels: torch.Tensor
    ignore_index: int


def scale_gradient(
    t: torch.Tensor, g: torch.Tensor, dtype: torch.dtype, may_overwrite: bool, rows: KeptRows | None = None
) -> torch.Tensor:
    """Return t * g, rounded once to `dtype`.

    Args:
        t: a gradient that the forward computed.
        g: a factor, (), or one per row.
        dtype: of the result.
        may_overwrite: whether the result may be written to t's memory.
        rows: rows that are not kept become 0, even if g is inf or nan; None keeps all.
    """
    product = (t.to(g.dtype) * (g.reshape(*t.shape[:-1], 1) if g.dim() else g)).to(dtype)
    if rows is None:
        return product
    return product.masked_fill_((rows.labels == rows.ignore_index).reshape(*t.shape[:-1], 1), 0)


def run_forward(
    compute: Callable[[Problem], Solution],
    x: torch.Tensor,
    labels: torch.Tensor,
    wanted: Wanted,
    reduction: str,
    **given: Any,
) -> tuple[torch.Tensor, ...]:
    """Return the loss, the gradients that the forward computes (empty tensors for others), and the count.

    Raises:
        ValueError: for an unknown reduction, or if labels do not match x.
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction must be one of {', '.join(REDUCTIONS)}; got {reduction!r}")
    if not is_fake(x) and labels.numel() * x.shape[-1] != x.numel():
        raise ValueError(f"linear_cross_entropy: {labels.numel()} labels for x of shape {tuple(x.shape)}")
    head, loss = _head(given), _loss(given)
    targets = labels.reshape(-1)
    count = (targets != loss.ignore_index).sum()
    parameters = {name: given[name] for name in PARAMETERS if given[name] is not None}
    names = tuple(n for n in (("x",) if reduction == "none" else ("x", *parameters)) if wanted[n])
    g = assumed_grad(count, reduction, fp16_loss_scale(loss.scale, head.base_dtype, head.lora_dtype), head.wide)
    losses, gradients = compute(Problem(x, targets, head, loss, names, parameters, g))
    total = losses if reduction == "none" else losses.sum(dtype=_sum_dtype(losses))
    total = total / count if reduction == "mean" else total
    gradients = {n: t if n == "x" else t.to(gradient_dtype(parameters[n].dtype)) for n, t in gradients.items()}
    residuals = [gradients[name] if name in gradients else x.new_empty(0) for name in ("x", *PARAMETERS)]
    return total.to(head.logits_dtype), *residuals, count


def _sum_dtype(losses: torch.Tensor) -> torch.dtype:
    """Return float64 where the device supports it, so that the sum over all tokens is rounded only once."""
    return torch.float64 if losses.device.type in ("cpu", "cuda", "meta") else losses.dtype


def run_backward(
    compute: Callable[[Problem], Solution],
    scale_gradient: Callable[..., torch.Tensor],
    wanted: Wanted,
    grads: list[torch.Tensor],
    may_overwrite: bool,
    x: torch.Tensor | None,
    labels: torch.Tensor,
    count: torch.Tensor,
    reduction: str,
    **given: Any,
) -> Gradients:
    """Return the forward's gradients times the incoming one, and compute those that the forward could not.

    If no token is kept, all gradients are 0 even if the incoming one is not finite, as after a division by 0 tokens.
    """
    names = [name for name in ("x", *PARAMETERS) if wanted[name]]
    loss = _loss(given)
    g = grads[0].to(torch.promote_types(given["logits_dtype"], torch.float32))
    targets = labels.reshape(-1)
    if reduction == "none":
        g = torch.where(targets != loss.ignore_index, g, 0)
    fp16_scale = fp16_loss_scale(loss.scale, given["base_dtype"], given["lora_a_dtype"] and given["lora_dtype"])
    factor = g if fp16_scale is None else g / fp16_scale
    if reduction == "mean" and fp16_scale is not None:
        factor = factor / count.clamp(min=1)
    computed = names if reduction != "none" else [name for name in names if name == "x"]
    gradients = {}
    for name in computed:
        saved, dtype = given[f"grad_{name}"], given[f"{name}_dtype"]
        if name == "x":
            rows = KeptRows(targets, loss.ignore_index)
            gradients[name] = scale_gradient(saved, factor, dtype, may_overwrite, rows)
        else:
            gradients[name] = scale_gradient(saved, torch.where(count > 0, factor, 0), dtype, may_overwrite)
    missing = tuple(name for name in names if name not in computed)
    if missing and x is not None:
        parameters = {name: given[name] for name in missing}
        _, late = compute(Problem(x, targets, _head(given), loss, missing, parameters, g))
        gradients |= {name: late[name].to(parameters[name].dtype) for name in missing}
    return gradients


def _head(given: dict[str, Any]) -> Head:
    names = (*PARAMETERS, "scaling", "lora_dtype", "base_dtype", "logits_dtype")
    return Head.of(**{name: given[name] for name in names})


def _loss(given: dict[str, Any]) -> Loss:
    return Loss(**{field.name: given[field.name] for field in fields(Loss)})


linear_cross_entropy = register_op(
    "linear_cross_entropy",
    family="loss",
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor labels, Tensor? lora_a, Tensor? lora_b, float? scaling, "
        "ScalarType? lora_dtype, float scale, float softcap, int ignore_index, str reduction, float label_smoothing, "
        "float z_loss, ScalarType base_dtype, ScalarType logits_dtype) -> (Tensor loss, Tensor grad_x, "
        "Tensor grad_weight, Tensor grad_bias, Tensor grad_lora_a, Tensor grad_lora_b, Tensor count)"
    ),
    outputs=1,
    reference=reference,
    forward=partial(run_forward, compute),
    backward=partial(run_backward, compute, scale_gradient),
    saves=("x", "labels", *PARAMETERS, *(f"grad_{name}" for name in ("x", *PARAMETERS)), "count"),
    saved_if={
        **dict.fromkeys(("x", *PARAMETERS), recomputes),
    },
    policy=Policy(grads_in_forward=True),
    choices={"reduction": REDUCTIONS},
    cost=Cost(
        forward=Work(flops="2*T*H*V", bytes="T*H*b + V*H*w + 8*T"),
        backward=Work(flops="2*T*H*V*(1 + S)", bytes="T*H*b + S*V*H*w"),
    ),
)
