"""Cross-entropy of a linear head's logits, without the logits: a chunk of tokens at a time.

    z = softcap * tanh(l / softcap)            l = linear(x, W, b).to(logits_dtype) * scale; no softcap: z = l
    lse = log(sum over v of exp(z_v))
    loss_t = (1 - e) * (lse - z_y) + e * (lse - mean over v of z_v)            e = label_smoothing, y the label of t

and 0 where y is `ignore_index`; then the sum over tokens, or the mean over those not ignored (nan if there is none).

Backward, with g_t the gradient of loss_t (dloss, divided by the count for the mean, 0 for ignored tokens) and p the
softmax of z:

    dz_v = g_t * (p_v - (1 - e) * [v = y] - e / V)
    dl_v = dz_v * (1 - tanh(l_v / softcap)^2) * scale
    dx = dl W        dW = dl^T x        db = sum over tokens of dl

because the gradient of lse is p.  dl meets W and x in base_dtype, as autograd has it; dW and db are summed over chunks
in float32 or wider.

Saved: x, W, b, labels, and lse as its two parts, max(z) and log(sum(exp(z - max))), two numbers per token.  Their sum
would round away the digits that p = exp(z - max - logsum) has when the model is sure.  The logits of a chunk are
computed again.

A chunk has as many tokens as 64 MiB hold rows of float32 logits.  Neither loss nor gradients depend on it but for
rounding.  Ignored tokens are masked.

Shapes: x (..., H) with T tokens, W (V, H), b (V,), labels T entries; loss () or, unreduced, (T,).
Sources: first principles; chunks as in Hsu et al., "Liger Kernel" (2024) and Wijmans et al., "Cut Your Losses in
Large-Vocabulary Language Models" (2024).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from fastlora.kernels.op import Gradients, Wanted, op

_CHUNK_BYTES = 64 << 20


def chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Slices that cover the tokens, each of at most `_CHUNK_BYTES` of float32 logits."""
    if isinstance(tokens, torch.SymInt) or isinstance(vocabulary, torch.SymInt):
        yield slice(None)  # a fake run with symbolic sizes: a loop would fix them, and one chunk has the same shapes
        return
    size = max(1, _CHUNK_BYTES // (4 * vocabulary))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    base_dtype: torch.dtype,
    logits_dtype: torch.dtype,
) -> torch.Tensor:
    """Head and loss as the models write them, with all logits at once. Returns the loss in `logits_dtype`."""
    bias = None if bias is None else bias.to(base_dtype)
    logits = F.linear(x.to(base_dtype), weight.to(base_dtype), bias).to(logits_dtype) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(
        logits.reshape(-1, weight.shape[0]),
        labels.reshape(-1),
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )


class Head:
    """The linear head, cast once: its operands in `base_dtype`, its logits as `logits_dtype` has them but in `wide`."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, base_dtype: torch.dtype, logits_dtype: torch.dtype
    ) -> None:
        self.weight = weight.to(base_dtype)
        self.bias = None if bias is None else bias.to(base_dtype)
        self.logits_dtype = logits_dtype
        self.wide = torch.promote_types(logits_dtype, torch.float32)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias).to(self.logits_dtype).to(self.wide)


def cap(logits: torch.Tensor, scale: float, softcap: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """z, and tanh(l / softcap), from the head's output; without a softcap z is l, and there is no tanh."""
    logits = logits * scale
    if softcap <= 0:
        return logits, None
    t = torch.tanh(logits / softcap)
    return softcap * t, t


def token_loss(
    z: torch.Tensor, labels: torch.Tensor, ignore_index: int, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each row of z, and lse in two parts, (T, 2)."""
    peak = z.amax(-1, keepdim=True)
    below = z - peak
    log_sum = below.exp().sum(-1).log()
    # nll_loss picks -below[label], gives 0 for ignored rows, and refuses labels out of range
    loss = log_sum + F.nll_loss(below, labels, ignore_index=ignore_index, reduction="none")
    if label_smoothing > 0:
        loss = (1 - label_smoothing) * loss + label_smoothing * (log_sum - below.mean(-1))
    return loss.masked_fill(labels == ignore_index, 0), torch.stack((peak.squeeze(-1), log_sum), dim=-1)


def logits_gradient(
    z: torch.Tensor,
    t: torch.Tensor | None,
    lse: torch.Tensor,
    labels: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    """dl, from the gradient g of each token's loss, which is 0 for ignored ones."""
    peak, log_sum = lse.unsqueeze(-1).unbind(1)
    dz = (z - peak - log_sum).exp() * g[:, None]
    if label_smoothing > 0:
        dz -= g[:, None] * (label_smoothing / z.shape[-1])
    safe = labels.masked_fill(labels == ignore_index, 0)[:, None]  # where g is 0, so that any column will do
    dz.scatter_add_(-1, safe, g[:, None] * (label_smoothing - 1))
    if t is not None:
        dz *= 1 - t * t
    return dz * scale


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    base_dtype: torch.dtype,
    logits_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the loss and the residual lse, (T, 2)."""
    tokens, targets = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    head = Head(weight, bias, base_dtype, logits_dtype)
    loss = tokens.new_empty(tokens.shape[0], dtype=head.wide)
    lse = tokens.new_empty(tokens.shape[0], 2, dtype=head.wide)
    for chunk in chunks(tokens.shape[0], weight.shape[0]):
        z, _ = cap(head.logits(tokens[chunk]), scale, softcap)
        loss[chunk], lse[chunk] = token_loss(z, targets[chunk], ignore_index, label_smoothing)
    if reduction == "none":
        return loss.to(logits_dtype), lse
    total = loss.sum()
    if reduction == "mean":
        total = total / (targets != ignore_index).sum()
    elif reduction != "sum":
        raise ValueError(f"linear_cross_entropy: reduction {reduction!r} is none of mean, sum, none")
    return total.to(logits_dtype), lse


def backward(
    wanted: Wanted,
    grads: list[torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    labels: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    softcap: float,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    base_dtype: torch.dtype,
    logits_dtype: torch.dtype,
) -> Gradients:
    tokens, targets = x.reshape(-1, x.shape[-1]), labels.reshape(-1)
    head = Head(weight, bias, base_dtype, logits_dtype)
    kept = targets != ignore_index
    g = grads[0].to(head.wide)
    if reduction == "mean":
        g = g / kept.sum()
    g = torch.where(kept, g, 0)

    sums = torch.promote_types(base_dtype, torch.float32)
    dx = torch.empty_like(tokens) if wanted["x"] else None
    dw = torch.zeros_like(weight, dtype=sums) if wanted["weight"] else None
    db = torch.zeros_like(bias, dtype=sums) if bias is not None and wanted["bias"] else None
    for chunk in chunks(tokens.shape[0], weight.shape[0]):
        z, t = cap(head.logits(tokens[chunk]), scale, softcap)
        dl = logits_gradient(z, t, lse[chunk], targets[chunk], g[chunk], scale, ignore_index, label_smoothing)
        dl = dl.to(base_dtype)
        if dx is not None:
            dx[chunk] = dl @ head.weight
        if dw is not None:
            dw.addmm_(dl.t().to(sums), tokens[chunk].to(base_dtype).to(sums))
        if db is not None:
            db += dl.sum(0, dtype=sums)
    return {
        "x": None if dx is None else dx.reshape(x.shape),
        "weight": None if dw is None else dw.to(weight.dtype),
        "bias": None if db is None or bias is None else db.to(bias.dtype),
    }


linear_cross_entropy = op(
    "linear_cross_entropy",
    family="loss",
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor labels, float scale, float softcap, int ignore_index, "
        "str reduction, float label_smoothing, ScalarType base_dtype, ScalarType logits_dtype) "
        "-> (Tensor loss, Tensor lse)"
    ),
    outputs=1,
    reference=reference,
    forward=forward,
    backward=backward,
    saves=("x", "weight", "bias", "labels", "lse"),
)
