"""Graphs that resemble RMSNorm or LayerNorm are not fused, or only a smaller part of them is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from graphs import WRITES, Lookalike, analyse, bf16, randn, rms_norm
from torch import Tensor

X, Y, W = randn(2, 3, 16), randn(2, 3, 16, seed=1), randn(16)
SQUARE = randn(16, 16)
BF16 = X.detach().to(bf16).requires_grad_()
EPS = 1e-6


def root(x: Tensor, eps: float = EPS) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def escaping_root(x, w):
    r = root(x)
    return x * r * w, r


def escaping_mean(x, w):
    mean = x.pow(2).mean(-1, keepdim=True)
    return x * torch.rsqrt(mean + EPS) * w + mean


def escaping_normalised(x, w):
    n = x * root(x)
    return n * w, n


def mutated_square(x, w):
    square = x.pow(2)
    square.clamp_(max=1.0)
    return x * torch.rsqrt(square.mean(-1, keepdim=True) + EPS) * w


def augmented_mean(x, w):
    mean = x.pow(2).mean(-1, keepdim=True)
    mean += x.abs().mean(-1, keepdim=True)
    return x * torch.rsqrt(mean + EPS) * w


def statistics_of_a_snapshot(x, w):
    x = x * 1.5
    before = x.clone()
    x.add_(1)
    return x * root(before) * w


def square_of_a_snapshot(x, w):
    x = x * 1.5
    before = x.clone()
    x.add_(1)
    return x * torch.rsqrt((x * before).mean(-1, keepdim=True) + EPS) * w


def statistics_without_gradients(x, w):
    with torch.no_grad():
        r = root(x)
    return x * r * w


def statistics_of_a_copy_without_gradients(x, w):
    with torch.no_grad():
        h = x.clone()
    return x * root(h) * w


def statistics_under_autocast(x, w):
    with torch.autocast("cpu", dtype=bf16):
        r = root(x)
    return x * r * w


def hooked_normalised(x, w):
    n = x * root(x)
    n.register_hook(lambda grad: grad * 3)
    return n * w


def retained_root(x, w):
    r = root(x)
    r.retain_grad()
    return x * r * w


def sum_written_after(x, y, w):
    total = x + y
    n = rms_norm(total, w)
    total.add_(1)
    return n, total


def sum_written_before(x, y, w):
    total = x + y
    total.mul_(2)
    return rms_norm(total, w)


def uncentred(x, w):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w


def sample_variance(x, w):
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + EPS) * w


def centre_detached(x, w):
    centred = x - x.mean(-1, keepdim=True).detach()
    return centred * torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + EPS) * w


def rms_with(power):
    return lambda x, w: x * torch.rsqrt(power(x)) * w


LOOKALIKES = [
    Lookalike("mean over tokens", rms_with(lambda x: x.pow(2).mean(0, keepdim=True) + EPS), (SQUARE, W), missed="mean"),
    Lookalike("mean over two dimensions", rms_with(lambda x: x.pow(2).mean((-2, -1), keepdim=True) + EPS), (X, W)),
    Lookalike("mean over everything", rms_with(lambda x: x.pow(2).mean() + EPS), (X, W), missed="expected mean"),
    Lookalike("mean without keepdim", rms_with(lambda x: x.pow(2).mean(-1) + EPS), (SQUARE, W), missed="expected mean"),
    Lookalike(
        "mean in another dtype",
        rms_with(lambda x: x.pow(2).mean(-1, keepdim=True, dtype=torch.float64) + EPS),
        (X, W),
        missed="expected mean",
    ),
    Lookalike("sum for mean", rms_with(lambda x: x.pow(2).sum(-1, keepdim=True) + EPS), (X, W), missed="L2 norm"),
    Lookalike("cube for square", rms_with(lambda x: x.abs().pow(3).mean(-1, keepdim=True) + EPS), (X, W), missed="pow"),
    Lookalike("size for square", rms_with(lambda x: x.abs().mean(-1, keepdim=True) + EPS), (X, W), missed="abs"),
    Lookalike("no eps", rms_with(lambda x: x.pow(2).mean(-1, keepdim=True)), (X, W), missed="expected add"),
    Lookalike("eps outside of the root", lambda x, w: x * (root(x, 1.0) + EPS) * w, (X, W), missed="norm"),
    Lookalike(
        "eps is subtracted", rms_with(lambda x: x.pow(2).mean(-1, keepdim=True) - EPS), (X, W), missed="expected add"
    ),
    Lookalike(
        "eps depends on the data",
        rms_with(lambda x: x.pow(2).mean(-1, keepdim=True) + x.abs().amax() * EPS),
        (X, W),
        missed="is not a number",
    ),
    Lookalike(
        "eps is learned",
        lambda x, w, eps: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w,
        (X, W, torch.tensor(0.1, requires_grad=True)),
        missed="is not a number",
    ),
    Lookalike(
        "the square is detached",
        rms_with(lambda x: x.detach().pow(2).mean(-1, keepdim=True) + EPS),
        (X, W),
        missed="is not",
    ),
    Lookalike("the root is detached", lambda x, w: x * root(x).detach() * w, (X, W), missed="norm"),
    Lookalike("the statistics are another value's", lambda x, w, y: y * root(x) * w, (X, W, Y), missed="is not"),
    Lookalike(
        "the square is dropped out",
        rms_with(lambda x: F.dropout(x, 0.5).pow(2).mean(-1, keepdim=True) + EPS),
        (X, W),
        missed="is not",
    ),
    Lookalike("the root leaves the graph", escaping_root, (X, W), missed="leaves the graph as an output"),
    Lookalike("the mean is used elsewhere", escaping_mean, (X, W), missed="is also used by"),
    Lookalike("the square is clamped in place", mutated_square, (X, W), missed="clamp_"),
    Lookalike("the mean is added to in place", augmented_mean, (X, W), missed="expected mean"),
    Lookalike("the statistics are a snapshot's", statistics_of_a_snapshot, (X, W)),
    Lookalike("the square is with a snapshot", square_of_a_snapshot, (X, W)),
    Lookalike(
        "the statistics have no gradients",
        statistics_without_gradients,
        (X, W),
        missed="gradient or autocast modes",
    ),
    Lookalike("the statistics are a copy's without gradients", statistics_of_a_copy_without_gradients, (X, W)),
    Lookalike(
        "the statistics are under autocast",
        statistics_under_autocast,
        (X, W),
        missed="gradient or autocast modes",
    ),
    Lookalike("the root has its gradient retained", retained_root, (X, W), fullgraph=False),
    Lookalike(
        "the normalised value leaves the graph", escaping_normalised, (X, W), ("rms_norm",), refused="leaves the graph"
    ),
    Lookalike(
        "the weight is a row's",
        lambda x, w: x * root(x) * w,
        (X, randn(3, 1)),
        ("rms_norm",),
    ),
    Lookalike(
        "the weight is one number",
        lambda x, w: x * root(x) * w,
        (X, randn(1)),
        ("rms_norm",),
        refused="weight and x differ",
    ),
    Lookalike("the normalised value is gated", lambda x, w: x * root(x) * torch.sigmoid(x), (X, W), ("rms_norm",)),
    Lookalike("the weight is two's distance", lambda x, w: x * root(x) * (2.0 + w), (X, W), ("rms_norm",)),
    Lookalike("the normalised value is made whole", lambda x, w: (10 * x * root(10 * x)).to(torch.int32) * w, (X, W)),
    Lookalike("layer norm with a sample variance", sample_variance, (X, W), missed="var"),
    Lookalike("layer norm with a detached mean", centre_detached, (X, W), ("rms_norm",)),
    Lookalike("layer norm with an uncentred variance", uncentred, (X, W), missed="norm"),
    Lookalike(
        "layer norm over two dimensions",
        lambda x, w, b: F.layer_norm(x, (3, 16), w, b, EPS),
        (X, randn(3, 16), randn(3, 16, seed=1)),
        missed="several dimensions",
    ),
    Lookalike(
        "rms norm over two dimensions",
        lambda x, w: F.rms_norm(x, (3, 16), w, EPS),
        (X, randn(3, 16)),
        missed="several dimensions",
    ),
    Lookalike(
        "layer norm of a sum over two dimensions",
        lambda x, y, w, b: F.layer_norm(x + y, (3, 16), w, b, EPS),
        (X, Y, randn(3, 16), randn(3, 16, seed=1)),
        missed="several dimensions",
    ),
    Lookalike(
        "layer norm of a sum over two dimensions without a weight",
        lambda x, y: F.layer_norm(x + y, (3, 16), None, None, EPS),
        (X, Y),
        missed="several dimensions",
    ),
    Lookalike(
        "rms norm of a sum over two dimensions",
        lambda x, y: F.rms_norm(x + y, (3, 16), None, EPS),
        (X, Y),
        missed="several dimensions",
    ),
    Lookalike("the sum is written after its norm", sum_written_after, (BF16, BF16, W), missed="in place"),
    Lookalike("the sum is written before its norm", sum_written_before, (X, Y, W), ("rms_norm",)),
    Lookalike(
        "the sum broadcasts",
        lambda x, y, w: rms_norm(x + y, w),
        (X, randn(16, seed=1), W),
        ("rms_norm",),
        refused="shape",
    ),
    Lookalike("the sum promotes", lambda x, y, w: rms_norm(x + y, w), (X, BF16, W), ("rms_norm",), refused="dtype"),
    Lookalike("the sum has an alpha", lambda x, y, w: rms_norm(torch.add(x, y, alpha=2), w), (X, Y, W), ("rms_norm",)),
    Lookalike("a difference for the sum", lambda x, y, w: rms_norm(x - y, w), (X, Y, W), ("rms_norm",)),
    Lookalike(
        "a number of the graph for the sum",
        lambda x, w: rms_norm(x + x.shape[1], w),
        (X, W),
        ("rms_norm",),
        dynamic=True,
    ),
]


@pytest.mark.parametrize("case", LOOKALIKES, ids=str)
def test_norm_lookalikes_are_not_fused(case: Lookalike) -> None:
    case.check()


def test_a_norm_of_a_rounded_value_reads_the_rounded_value() -> None:
    """The op may read the rounded value, but must not skip the rounding."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        h = x.to(bf16)
        return (h * root(h)).float() * w

    outcome = analyse(function, X, W)
    assert all(match.tensor("x").dtype == bf16 for match in outcome.chosen)
    outcome.assert_close(1e-2)


@pytest.mark.parametrize("size", [(1,), (3, 1)], ids=str)
def test_a_weight_of_another_shape_is_not_fused_with_a_sum(size: tuple[int, ...]) -> None:
    outcome = analyse(lambda x, y, w: rms_norm(x + y, w), X, Y, randn(*size))
    assert all(match.arguments["weight"] is None for match in outcome.chosen)
    outcome.assert_close()


@pytest.mark.parametrize("name", WRITES)
def test_a_norm_whose_input_is_overwritten_is_not_fused(name: str) -> None:
    """Eager saves a float32 copy for its backward; the op would save the tensor that is overwritten."""

    def function(x: Tensor, w: Tensor) -> Tensor:
        x = x * 1.5
        y = rms_norm(x, w)
        WRITES[name](x)
        return y * x.sum()

    Lookalike(name, function, (BF16, W), missed="in place").check()


def test_a_hook_on_the_normalized_value_is_kept() -> None:
    """The hook gets eager's gradient, so at most the norm before the weight is fused."""
    outcome = analyse(hooked_normalised, X, W, fullgraph=False)
    assert set(outcome.ops) <= {"rms_norm"}
    outcome.assert_close()
