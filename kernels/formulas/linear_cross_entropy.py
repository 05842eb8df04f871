"""Cross-entropy of a linear head's logits, without the logits: a chunk of tokens at a time.

    l = linear(x, W, b) [+ s (x A^T) B^T]           the head, with a low-rank adapter on it if there is one
    l = l.to(logits_dtype) * scale
    z = softcap * tanh(l / softcap)                 no softcap: z = l
    lse = log(sum over v of exp(z_v))
    loss_t = (1 - e) * (lse - z_y) + e * (lse - mean over v of z_v) + c * lse^2

with e = label_smoothing, c = z_loss and y the label of t; 0 where y is `ignore_index`.  Then the sum over tokens, or
the mean over those not ignored (nan if there is none).

Backward, with g_t the gradient of loss_t (dloss, divided by the count for the mean, 0 for ignored tokens) and p the
softmax of z:

    dz_v = g_t * (p_v * (1 + 2 c lse) - (1 - e) * [v = y] - e / V)
    dl_v = dz_v * (1 - tanh(l_v / softcap)^2) * scale
    dx = dl W + dxa A      dW = dl^T x      db = sum over tokens of dl
    dxa = s dl B           dA = dxa^T x     dB = s dl^T xa                  xa = x A^T

because the gradient of lse is p.  dl meets each operand in that operand's dtype, as autograd has it, and sums over
tokens are made in float32 or wider.

All of this is linear in g_t, so the forward makes the gradients that are wanted from the logits it has at hand, as if
the gradient of its result were 1, and the backward only multiplies by what it is: the head's largest product is
computed once, and nothing is rounded twice if it is 1.  In float16 dl is made for g_t = `lift` instead, so that a mean
over many tokens makes no small probability vanish.  The unreduced loss alone has a g_t for each
token that is not known in time for sums over tokens: there the forward makes dx only, and the gradients of parameters,
if any are wanted, compute the logits again.

Saved: the gradients that were made, `made_*`, which have no elements otherwise, the labels and the count of kept
tokens; for the unreduced loss, with trained parameters, the inputs.

A chunk has as many tokens as `CHUNK_BYTES` hold rows of logits.  Neither loss nor gradients depend on it but for
rounding.  Ignored tokens meet no product, so that an inf or nan in them stays where it is.  (On a GPU this form, which
cannot ask how many there are without waiting for the answer, multiplies zeros in their place.)

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
from fastlora.kernels.formulas.lm_head import PARAMETERS, Head, Sums, made_dtype
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
    """Head and loss as the models write them, with all logits at once. Returns the loss in `logits_dtype`."""
    logits = F.linear(x.to(base_dtype), weight.to(base_dtype), cast(bias, base_dtype))
    if lora_a is not None and lora_b is not None:
        wide = lora_dtype or base_dtype
        low = F.linear(F.linear(x.to(wide), lora_a.to(wide)), lora_b.to(wide))
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
    """How many tokens a chunk has."""
    return max(1, budget // (logit_bytes * vocabulary))


def chunks(tokens: int, rows: int) -> Iterator[slice]:
    """Slices of up to `rows` that cover the tokens; an empty one if there are none."""
    for start in range(0, max(tokens, 1), rows):
        yield slice(start, min(start + rows, tokens))


def recomputes(wanted: Wanted, given: dict[str, Any]) -> bool:
    """Whether the backward needs the logits again."""
    return given["reduction"] == "none" and any(wanted[name] for name in PARAMETERS)


def lift(scale: float, *dtypes: torch.dtype | None) -> float | None:
    """What the forward takes for the gradient of each loss where dl may be float16, which has no number below 6e-8, and
    a vocabulary has many words that are less likely: a power of two, which rounds nothing. None for other dtypes."""
    if torch.float16 not in dtypes:
        return None
    return 2.0 ** (3 - math.ceil(math.log2(max(abs(scale), 1.0))))


def assumed(count: torch.Tensor, reduction: str, lifted: float | None, dtype: torch.dtype) -> torch.Tensor:
    """What the forward takes for the gradient of each loss: as it is if that of the op's result is 1, or `lifted`."""
    one = count.new_full((), 1.0 if lifted is None else lifted, dtype=dtype)
    return one / count.clamp(min=1) if reduction == "mean" and lifted is None else one


@dataclass(frozen=True)
class Problem:
    """What to compute: the loss of each token, and the gradients of `names` where that of each loss is `g`, (T,) or one
    number for all."""

    x: torch.Tensor
    targets: torch.Tensor
    head: Head
    loss: Loss
    names: tuple[str, ...]
    parameters: dict[str, torch.Tensor]
    g: torch.Tensor

    def wants(self, name: str) -> bool:
        return name in self.names


Solution = tuple[torch.Tensor, Gradients]
"""The losses (T,), and the gradients by name: those of parameters in whatever dtype they were summed in."""


def solve(problem: Problem) -> Solution:
    """The PyTorch form's way."""
    x, targets, head, loss, g = problem.x, problem.targets, problem.head, problem.loss, problem.g
    tokens, kept = x.reshape(-1, x.shape[-1]), targets != loss.ignore_index
    picks = x.device.type == "cpu" and not is_fake(x)
    index = kept.nonzero()[:, 0] if picks else torch.arange(tokens.shape[0], device=x.device)
    rows = chunk_rows(head.weight.shape[0], head.wide.itemsize, CHUNK_BYTES)
    losses = tokens.new_zeros(tokens.shape[0], dtype=head.wide)
    dx = tokens.new_zeros(tokens.shape, dtype=head.sum_dtype) if problem.wants("x") else None
    wide = {n: torch.promote_types(p.dtype, torch.float32) for n, p in problem.parameters.items() if problem.wants(n)}
    sums = Sums(head, {n: torch.empty_like(problem.parameters[n], dtype=dtype) for n, dtype in wide.items()})
    for chunk in [slice(None)] if is_fake(x) else chunks(index.shape[0], rows):
        at = index[chunk]
        part = tokens[at] if picks else tokens[at].masked_fill(~kept[at][:, None], 0)
        xa = head.project(part)
        z, t = cap(head.logits(part, xa).to(head.wide), loss)
        losses[at], peak, log_sum = token_loss(z, targets[at], loss)
        if problem.names:
            each = g[at] if g.dim() else g
            dl = logits_gradient(z, t, peak, log_sum, targets[at], each, loss).to(head.sum_dtype)
            dxa = head.unproject(dl)
            sums.add(dl, dxa, part, xa)
            if dx is not None:
                dx[at] = head.input_gradient(dl, dxa)
    return losses, sums.totals | ({} if dx is None else {"x": dx.reshape(x.shape)})


@dataclass(frozen=True)
class KeptRows:
    """Which rows are no ignored tokens: the labels (T,), and the one that is ignored."""

    labels: torch.Tensor
    ignore_index: int


def multiplied(
    t: torch.Tensor, g: torch.Tensor, dtype: torch.dtype, may_overwrite: bool, rows: KeptRows | None = None
) -> torch.Tensor:
    """t times g, one number or one for each row, rounded once; rows that are not kept become 0 even if g is inf or nan.
    Nothing else reads a `may_overwrite` t."""
    product = (t.to(g.dtype) * (g.reshape(*t.shape[:-1], 1) if g.dim() else g)).to(dtype)
    if rows is None:
        return product
    return product.masked_fill_((rows.labels == rows.ignore_index).reshape(*t.shape[:-1], 1), 0)


def make(
    solve: Callable[[Problem], Solution],
    x: torch.Tensor,
    labels: torch.Tensor,
    wanted: Wanted,
    reduction: str,
    **given: Any,
) -> tuple[torch.Tensor, ...]:
    """The forward: loss, gradients as far as the forward makes them, and count."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction {reduction!r} is none of {', '.join(REDUCTIONS)}")
    if not is_fake(x) and labels.numel() * x.shape[-1] != x.numel():
        raise ValueError(f"linear_cross_entropy: {labels.numel()} labels for x of shape {tuple(x.shape)}")
    head, loss = _head(given), _loss(given)
    targets = labels.reshape(-1)
    count = (targets != loss.ignore_index).sum()
    parameters = {name: given[name] for name in PARAMETERS if given[name] is not None}
    names = tuple(n for n in (("x",) if reduction == "none" else ("x", *parameters)) if wanted[n])
    g = assumed(count, reduction, lift(loss.scale, head.base_dtype, head.lora_dtype), head.wide)
    losses, made = solve(Problem(x, targets, head, loss, names, parameters, g))
    total = losses if reduction == "none" else losses.sum(dtype=_sum_dtype(losses))
    total = total / count if reduction == "mean" else total
    made = {n: t if n == "x" else t.to(made_dtype(parameters[n].dtype)) for n, t in made.items()}
    residuals = [made[name] if name in made else x.new_empty(0) for name in ("x", *PARAMETERS)]
    return total.to(head.logits_dtype), *residuals, count


def _sum_dtype(losses: torch.Tensor) -> torch.dtype:
    """The loss of all tokens is one number, which is to be rounded once: summed in float64, where the device has it."""
    return torch.float64 if losses.device.type in ("cpu", "cuda", "meta") else losses.dtype


def differentiate(
    solve: Callable[[Problem], Solution],
    multiplied: Callable[..., torch.Tensor],
    wanted: Wanted,
    grads: list[torch.Tensor],
    may_overwrite: bool,
    x: torch.Tensor | None,
    labels: torch.Tensor,
    count: torch.Tensor,
    reduction: str,
    **given: Any,
) -> Gradients:
    """The backward: what the forward made times the incoming gradient, and what it could not make. Of a batch without
    kept tokens all gradients are 0, also where the incoming one is not finite, as that of a sum divided by 0 is."""
    names = [name for name in ("x", *PARAMETERS) if wanted[name]]
    loss = _loss(given)
    g = grads[0].to(torch.promote_types(given["logits_dtype"], torch.float32))
    targets = labels.reshape(-1)
    if reduction == "none":
        g = torch.where(targets != loss.ignore_index, g, 0)
    lifted = lift(loss.scale, given["base_dtype"], given["lora_a_dtype"] and given["lora_dtype"])
    factor = g if lifted is None else g / lifted
    if reduction == "mean" and lifted is not None:
        factor = factor / count.clamp(min=1)
    ready = names if reduction != "none" else [name for name in names if name == "x"]
    rows = KeptRows(targets, loss.ignore_index)
    gradients = {
        name: multiplied(given[f"made_{name}"], factor, given[f"{name}_dtype"], may_overwrite, rows)
        if name == "x"
        else multiplied(given[f"made_{name}"], torch.where(count > 0, factor, 0), given[f"{name}_dtype"], may_overwrite)
        for name in ready
    }
    late = tuple(name for name in names if name not in ready)
    if late and x is not None:
        parameters = {name: given[name] for name in late}
        _, made = solve(Problem(x, targets, _head(given), loss, late, parameters, g))
        gradients |= {name: made[name].to(parameters[name].dtype) for name in late}
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
        "float z_loss, ScalarType base_dtype, ScalarType logits_dtype) -> (Tensor loss, Tensor made_x, "
        "Tensor made_weight, Tensor made_bias, Tensor made_lora_a, Tensor made_lora_b, Tensor count)"
    ),
    outputs=1,
    reference=reference,
    forward=partial(make, solve),
    backward=partial(differentiate, solve, multiplied),
    saves=("x", "labels", *PARAMETERS, *(f"made_{name}" for name in ("x", *PARAMETERS)), "count"),
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
