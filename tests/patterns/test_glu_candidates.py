"""Candidates for gated units: each is counted once, in every spelling, with the reason why it is not fused; look-alikes
are not counted. What reports and strict=True say about them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from candidates import Function, assert_none, assert_one
from graphs import lora, randn
from torch import Tensor, nn

import fastlora

X = randn(2, 3, 16)
INTO, ONTO, BOTH = randn(24, 16), randn(24, 16, seed=1), randn(48, 16)
SILU, GELU = "gated by a SiLU that is spelled out", "gated by a GELU that is spelled out"
WRITTEN_OVER = "the product is written in place over the activation"


def augmented(g: Tensor, u: Tensor) -> Tensor:
    active = F.silu(g)
    active *= u
    return active


def read_twice(g: Tensor, u: Tensor) -> Tensor:
    first = g[0]
    return F.silu(g, inplace=True) * u + first


def written_twice(g: Tensor, u: Tensor) -> Tensor:
    active = F.silu(g)
    first = active[0]
    return active.mul_(u) + first


def tanh_gelu(g: Tensor) -> Tensor:
    return 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))


def clamped(g: Tensor, u: Tensor) -> Tensor:
    return (u + 1) * (g * torch.sigmoid(g * 1.702))


# What a product of an activation is, and why it stays; no reason where it is fused.
UNITS: dict[str, tuple[Function, str | None]] = {
    "silu": (lambda g, u: F.silu(g) * u, None),
    "gelu": (lambda g, u: u * F.gelu(g), None),
    "gelu by tanh": (lambda g, u: F.gelu(g, approximate="tanh") * u, None),
    "two activations": (lambda g, u: F.silu(g) * F.gelu(u), None),
    "two activations, made the other way round": (lambda g, u: torch.mul(other=F.silu(g), input=F.gelu(u)), None),
    "an activation and a sigmoid": (lambda g, u: F.silu(g) * torch.sigmoid(u), None),
    "silu spelled out": (lambda g, u: g * torch.sigmoid(g) * u, SILU),
    "silu spelled out, associated otherwise": (lambda g, u: torch.sigmoid(g) * (u * g), SILU),
    "silu spelled out, its parts apart": (lambda g, u: torch.sigmoid(g) * u * g, SILU),
    "silu by expit": (lambda g, u: g * torch.special.expit(g) * u, SILU),
    "silu by exp": (lambda g, u: g / (1 + torch.exp(-g)) * u, SILU),
    "silu in float64": (lambda g, u: (g.double() * torch.sigmoid(g.double())).float() * u, SILU),
    "silu spelled out, twice": (lambda g, u: (g * torch.sigmoid(g)) * (u * torch.sigmoid(u)), SILU),
    "quick-GELU": (lambda g, u: g * torch.sigmoid(1.702 * g) * u, "gated by quick-GELU, which no rule covers"),
    "quick-GELU of a clamped gate": (lambda g, u: clamped(g.clamp(max=7), u.clamp(-7, 7)), "gated by quick-GELU"),
    "gelu by erf": (lambda g, u: g * 0.5 * (1 + torch.erf(g / math.sqrt(2))) * u, GELU),
    "gelu by tanh, spelled out": (lambda g, u: tanh_gelu(g) * u, GELU),
    "squared relu": (lambda g, u: F.relu(g).square() * u, "gated by squared ReLU"),
    "relu to the power of 2": (lambda g, u: u * torch.relu(g) ** 2, "gated by squared ReLU"),
    "relu times relu": (lambda g, u: F.relu(g) * F.relu(g) * u, "gated by squared ReLU"),
    "mish": (lambda g, u: F.mish(g) * u, "gated by Mish"),
    "hardswish": (lambda g, u: F.hardswish(g) * u, "gated by hard swish"),
    "relu": (lambda g, u: F.relu(g) * u, "gated by ReLU"),
    "softplus": (lambda g, u: F.softplus(g) * u, "gated by softplus"),
    "sigmoid": (lambda g, u: torch.sigmoid(g) * u, "gated by a sigmoid"),
    "tanh": (lambda g, u: u * torch.tanh(g), "gated by tanh"),
    "an activation in place": (lambda g, u: F.silu(g, inplace=True) * u, None),
    "a product in place": (lambda g, u: F.silu(g).mul_(u), None),
    "an augmented activation": (augmented, None),
    "an activation in place of a value that is read": (read_twice, "the activation writes in place"),
    "a product in place of a value that is read": (written_twice, WRITTEN_OVER),
}  # fmt: skip


@pytest.mark.parametrize("name", UNITS)
def test_a_gated_unit_of_two_layers_is_one_candidate(name: str) -> None:
    unit, reason = UNITS[name]
    assert_one(lambda x, a, b: unit(F.linear(x, a), F.linear(x, b)), (X, INTO, ONTO), "glu", reason)


@pytest.mark.parametrize("name", ["silu spelled out", "quick-GELU", "relu", "sigmoid"])
def test_a_gated_unit_of_a_fused_layer_is_one_candidate(name: str) -> None:
    unit, reason = UNITS[name]
    assert_one(lambda x, w: unit(*F.linear(x, w).chunk(2, -1)), (X, BOTH), "glu", reason)


@pytest.mark.parametrize("name", ["relu", "sigmoid"])
def test_a_gated_unit_of_lora_layers_is_one_candidate(name: str) -> None:
    unit, reason = UNITS[name]
    adapters = [t for seed in (0, 1) for t in (randn(24, 16, grad=False, seed=seed), randn(4, 16), randn(24, 4))]

    def function(x: Tensor, *w: Tensor) -> Tensor:
        return unit(lora(x, *w[:3]), lora(x, *w[3:]))

    assert_one(function, (X, *adapters), "glu", reason)


@pytest.mark.parametrize("dim", [-1, 1])
def test_f_glu_is_a_candidate(dim: int) -> None:
    joined = "F.glu takes gate and up as one tensor, which no rule covers"
    assert_one(lambda x: F.glu(x, dim=dim), (randn(2, 4, 16),), "glu", joined)


def highway(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, a[:16]) + torch.sigmoid(F.linear(x, a[:16])) * F.linear(x, b[:16])


def squeezed(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    scale = torch.sigmoid(F.linear(F.relu(F.linear(x.mean(1, keepdim=True), a)), b.t()))
    return x * scale


def attention_gate(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    value = F.linear(x, b)
    attended = torch.softmax(x @ x.mT, -1) @ value
    return attended * torch.sigmoid(F.linear(x, a))


def lstm_cell(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, a)) * torch.tanh(F.linear(x, b))


def gru_cell(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    reset = torch.sigmoid(F.linear(x, a))
    return torch.tanh(F.linear(x, a) + reset * F.linear(x, b))


def router(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.sigmoid(F.linear(x, a[:1])) * F.linear(x, b)


def weighted_rows(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return F.silu(F.linear(x, a)) * x[..., :1] * F.linear(x, b)


NO_UNITS: dict[str, Function] = {
    "a gate of a residual branch": lambda x, a, b: x + torch.sigmoid(F.linear(x, a[:16])) * x,
    "a gate between two branches": highway,
    "squeeze and excitation": squeezed,
    "a gate of attention": attention_gate,
    "a cell of an LSTM": lstm_cell,
    "a cell of a GRU": gru_cell,
    "a router's weight": router,
    "rows that are weighted before": weighted_rows,
    "silu alone, spelled out": lambda x, a, b: x * torch.sigmoid(x) + x,
    "gelu alone, spelled out": lambda x, a, b: tanh_gelu(F.linear(x, a)) + F.linear(x, b),
    "a cap": lambda x, a, b: torch.tanh(F.linear(x, a) / 30) * 30 + F.linear(x, b),
    "squared relu alone": lambda x, a, b: F.relu(F.linear(x, a)).square(),
    "attention's weights": lambda x, a, b: torch.softmax(F.linear(x, a), -1) * F.linear(x, b),
    "a product of two layers": lambda x, a, b: F.linear(x, a) * F.linear(x, b),
    "a mask": lambda x, a, b: F.relu(F.linear(x, a)) * (F.linear(x, b) > 0),
    "a value of another input": lambda x, a, b: torch.sigmoid(F.linear(x, a)) * F.linear(F.relu(x).square(), b),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_UNITS)
def test_other_gates_are_not_candidates(name: str) -> None:
    assert_none(NO_UNITS[name], (X, INTO, ONTO), "glu")


# ---- what a report and strict=True say


class Written(nn.Module):
    """A block whose norm, gated unit and adapter are not covered by any rule."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16)
        self.lora_a, self.lora_b = nn.Conv1d(24, 4, 1, bias=False), nn.Conv1d(4, 16, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x, dim=-1) * 4.0
        gate = self.gate(x)
        hidden = gate * torch.sigmoid(1.702 * gate) * self.up(x)
        return self.down(hidden) + self.lora_b(self.lora_a(hidden.mT)).mT


def test_the_report_lists_unfused_candidates() -> None:
    report = fastlora.explain(Written(), x=X)
    assert {name: (c.seen, c.fused) for name, c in report.coverage.items() if c.seen} == {
        "glu": (1, 0),
        "lora": (1, 0),
        "norm": (1, 0),
    }
    assert {miss.op for miss in report.missed} == {"glu", "lora", "norm"}


@pytest.mark.parametrize("said", ["quick-GELU", "computed by conv1d", "normalized by F.normalize"])
def test_strict_raises_for_unfused_candidates(said: str) -> None:
    with pytest.raises(fastlora.StrictError, match=said):
        fastlora.compile(Written(), strict=True)(X.detach())


@pytest.fixture
def one_rank(tmp_path) -> Iterator[torch.distributed.device_mesh.DeviceMesh]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


class Adapted(nn.Module):
    def __init__(self, inner: int, outer: int) -> None:
        super().__init__()
        self.base = nn.Linear(inner, outer, bias=False)
        self.a, self.b = nn.Linear(inner, 4, bias=False), nn.Linear(4, outer, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * 2.0


def test_adapters_under_tensor_parallelism_are_candidates(one_rank) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = nn.Sequential(Adapted(16, 24), Adapted(24, 16))
    columns, rows = ColwiseParallel(), RowwiseParallel()
    first = {"0.base": columns, "0.a": ColwiseParallel(output_layouts=Replicate()), "0.b": columns}
    second = {"1.base": rows, "1.a": rows, "1.b": RowwiseParallel(input_layouts=Replicate())}
    parallelize_module(model, one_rank, first | second)
    report = fastlora.explain(model, input=X.detach())
    assert (report.coverage["lora"].seen, report.coverage["lora"].fused) == (2, 0)
    assert all("of the tensor subclass DTensor, which no rule covers" in miss.reason for miss in report.missed)
