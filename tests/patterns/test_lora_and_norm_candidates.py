"""Candidates for adapters and norms: each is counted once, in every spelling, with the reason why it is not fused;
look-alikes are not counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from candidates import Function, assert_none, assert_one
from graphs import randn
from torch import Tensor, nn

import fastlora

X = randn(2, 3, 16)

# ---- adapters

W, A, B = randn(24, 16, grad=False), randn(4, 16), randn(24, 4)
PAIRS: dict[str, tuple[Function, str | None]] = {
    "linear": (lambda x, a, b: F.linear(F.linear(x, a), b) * 2.0, None),
    "matmul": (lambda x, a, b: x @ a.t() @ b.t() * 2.0, None),
    "matmul of a transposed weight": (lambda x, a, b: x @ a.mT.contiguous() @ b.mT.contiguous(), None),
    "a scale between": (lambda x, a, b: F.linear(F.linear(x, a) * 2.0, b), None),
    "a learned scale between": (lambda x, a, b: F.linear(F.linear(x, a) * a[:, 0], b), "mul between A and B"),
    "a dropout between": (lambda x, a, b: F.linear(F.dropout(F.linear(x, a), 0.5), b), "dropout between A and B"),
    "a change of layout between": (
        lambda x, a, b: F.linear(F.linear(x, a).transpose(0, 1).transpose(0, 1), b),
        "between A and B",
    ),
    "a cast between": (lambda x, a, b: F.linear(F.linear(x, a).double(), b.double()).float(), "is not a parameter"),
    "matmul with plain weights": (lambda x, a, b: x @ a.view(16, 4) @ b.view(4, 24), "computed by matmul"),
    "einsum": (
        lambda x, a, b: torch.einsum("bsr,or->bso", torch.einsum("bsi,ri->bsr", x, a), b),
        None,
    ),
    "einsum with the weight first": (
        lambda x, a, b: torch.einsum("or, bsr -> bso", b, torch.einsum("ri, bsi -> bsr", a, x)),
        None,
    ),
    "addmm": (
        lambda x, a, b: torch.addmm(x.new_zeros(6, 24), F.linear(x.view(6, 16), a), b.view(4, 24)).view(2, 3, 24),
        "computed by addmm and linear",
    ),
    "convolutions of one place": (
        lambda x, a, b: F.conv1d(F.conv1d(x.transpose(1, 2), a[..., None]), b[..., None]).transpose(1, 2),
        "computed by conv1d",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_an_adapter_is_one_candidate(name: str) -> None:
    pair, reason = PAIRS[name]
    assert_one(lambda x, w, a, b: F.linear(x, w) + pair(x, a, b), (X, W, A, B), "lora", reason)


NO_PAIRS: dict[str, Function] = {
    "an activation between": lambda x, a, b: F.linear(F.relu(F.linear(x, a)), b),
    "a norm between": lambda x, a, b: F.linear(F.rms_norm(F.linear(x, a), (4,)), b),
    "a piece between": lambda x, a, b: F.linear(F.linear(x, a)[..., :2], b[:, :2]),
    "a product of features between": lambda x, a, b: F.linear(F.linear(x, a) * F.linear(x, a.flip(0)), b),
    "a larger inner size": lambda x, a, b: F.linear(F.linear(x, b.repeat(1, 4)), a.repeat(1, 2)[:, :24]),
    "attention": lambda x, a, b: torch.softmax(x @ x.mT, -1) @ x,
    "linear attention": lambda x, a, b: F.linear(x, a) @ (F.linear(x, a).mT @ F.linear(x, a)),
    "a layer with a bias": lambda x, a, b: F.linear(F.linear(x, a, a[:, 0]), b),
    "one product": lambda x, a, b: F.linear(x, a),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_PAIRS)
def test_other_products_are_not_candidates(name: str) -> None:
    assert_none(NO_PAIRS[name], (X, A, B), "lora")


# ---- norms

NORM_W = randn(16)
L2 = "it divides by the root of a sum, as an L2 norm does, and not of a mean"
BY_NORM = "normalized by norm(), which no rule covers"
NORMS: dict[str, tuple[Function, str | None]] = {
    "rsqrt": (lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w, None),
    "a root": (lambda x, w: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w, None),
    "rms_norm": (lambda x, w: F.rms_norm(x, (16,), w, 1e-6), None),
    "a root without eps": (lambda x, w: x / torch.sqrt(x.pow(2).mean(-1, keepdim=True)) * w, "expected add"),
    "norm and a scale": (lambda x, w: x / (x.norm(dim=-1, keepdim=True) * 16**-0.5 + 1e-6) * w, BY_NORM),
    "norm and a scale after it": (lambda x, w: x / x.norm(2, dim=-1, keepdim=True).clamp(min=1e-6) * 4.0 * w, BY_NORM),
    "the inverse of a norm": (lambda x, w: x * (4.0 / x.norm(dim=-1, keepdim=True)) * w, BY_NORM),
    "norm in float64": (lambda x, w: (x / x.double().norm(dim=-1, keepdim=True)).float() * 4.0 * w, BY_NORM),
    "normalize and a scale": (lambda x, w: F.normalize(x, dim=-1) * 4.0 * w, "normalized by F.normalize"),
    "normalize": (lambda x, w: F.normalize(x, dim=-1), L2),
    "norm": (lambda x, w: x / x.norm(dim=-1, keepdim=True), L2),
    "torch.norm": (lambda x, w: x / (torch.norm(x, dim=-1, keepdim=True) + 1e-6), L2),
    "torch.linalg.norm": (lambda x, w: x / torch.linalg.norm(x, dim=-1, keepdim=True), L2),
    "torch.linalg.vector_norm": (lambda x, w: x / torch.linalg.vector_norm(x, dim=-1)[..., None], L2),
    "the root of a sum": (lambda x, w: x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6), L2),
    "rsqrt of a sum": (lambda x, w: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6), L2),
    "several dimensions": (lambda x, w: F.rms_norm(x, (3, 16)), "it normalizes several dimensions"),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_a_norm_is_one_candidate(name: str) -> None:
    norm, reason = NORMS[name]
    assert_one(norm, (X, NORM_W), "norm", reason)


NO_NORMS: dict[str, Function] = {
    "a group norm": lambda x, w: F.group_norm(x.mT, 4),
    "a batch norm": lambda x, w: F.batch_norm(x.mT, None, None, training=True),
    "the norm of another value": lambda x, w: x / F.silu(x).norm(dim=-1, keepdim=True),
    "a distance": lambda x, w: (x - w).norm(dim=-1, keepdim=True) * w,
    "a product with a norm": lambda x, w: x * x.norm(dim=-1, keepdim=True),
    "the root of a sum of squares": lambda x, w: (x * x).sum(-1, keepdim=True).sqrt() * w,
    "a clipped length": lambda x, w: x * (2.0 / (x.norm(dim=-1, keepdim=True) + 1e-6)).clamp(max=1.0),
    "a norm over all": lambda x, w: x / x.norm(),
    "a norm over the first dimension": lambda x, w: x / x.norm(dim=0, keepdim=True),
    "a sum of sizes": lambda x, w: x / x.norm(p=1, dim=-1, keepdim=True),
    "a standard score": lambda x, w: x / 2.0 - w,
}  # fmt: skip


@pytest.mark.parametrize("name", NO_NORMS)
def test_other_divisions_are_not_candidates(name: str) -> None:
    assert_none(NO_NORMS[name], (X, NORM_W), "norm")


def test_the_norm_of_a_weight_is_not_a_candidate() -> None:
    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(randn(8, 16).detach())

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, F.normalize(self.weight, dim=-1) / self.weight.norm(dim=-1, keepdim=True))

    report = fastlora.explain(Cosine(), x=X)
    assert report.coverage["norm"].seen == 0
