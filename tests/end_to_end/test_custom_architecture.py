"""Nothing is matched by name: a custom architecture, LoRA class and op are fused as well."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from tiny_models import relative
from torch import Tensor, nn

import fastlora
from fastlora.graph.canonical_ops import spell
from fastlora.kernels.core.library import register_op
from fastlora.match.dsl import Op
from fastlora.match.rule import rule

WIDTH, HEADS, WORDS, RANK = 16, 2, 40, 3


class Retouched(nn.Module):
    """A frozen layer with a low-rank correction."""

    def __init__(self, width: int, height: int) -> None:
        super().__init__()
        self.original = nn.Linear(width, height, bias=False).requires_grad_(False)
        self.squeeze = nn.Parameter(torch.randn(RANK, width) / 4)
        self.stretch = nn.Parameter(torch.randn(height, RANK) / 4)
        self.strength = 0.5

    def forward(self, signal: Tensor) -> Tensor:
        correction = F.linear(F.linear(signal, self.squeeze), self.stretch)
        return self.original(signal) + self.strength * correction


class Leveller(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, signal: Tensor) -> Tensor:
        power = (signal * signal).mean(-1, keepdim=True)
        return self.gain * (signal / torch.sqrt(power + 1e-5))


def turned(signal: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    near, far = signal.chunk(2, dim=-1)
    return signal * angles[0] + torch.cat((-far, near), dim=-1) * angles[1]


class Stratum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Leveller(), Leveller()
        self.asks, self.answers, self.tells, self.sums_up = (Retouched(WIDTH, WIDTH) for _ in range(4))
        self.opens, self.flows, self.closes = Retouched(WIDTH, 24), Retouched(WIDTH, 24), Retouched(24, WIDTH)

    def forward(self, signal: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        level = self.first(signal)
        parts = (
            part(level).unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)
            for part in (self.asks, self.answers, self.tells)
        )
        asked, answered, told = parts
        heard = F.scaled_dot_product_attention(turned(asked, angles), turned(answered, angles), told, is_causal=True)
        signal = signal + self.sums_up(heard.transpose(1, 2).flatten(-2))
        level = self.second(signal)
        return signal + self.closes(F.silu(self.opens(level)) * self.flows(level))


class Delta(nn.Module):
    """A language model whose modules have unusual names."""

    def __init__(self) -> None:
        super().__init__()
        self.lexicon = nn.Embedding(WORDS, WIDTH).requires_grad_(False)
        self.strata = nn.ModuleList(Stratum() for _ in range(3))
        self.surface = nn.Linear(WIDTH, WORDS, bias=False).requires_grad_(False)

    def forward(self, words: Tensor) -> Tensor:
        steps = torch.arange(words.shape[1])[:, None] * 0.5 ** torch.arange(WIDTH // HEADS // 2)
        angles = tuple(wave(torch.cat((steps, steps), -1)) for wave in (torch.cos, torch.sin))
        signal = self.lexicon(words)
        for stratum in self.strata:
            signal = stratum(signal, angles)
        guesses = self.surface(signal)
        return F.cross_entropy(guesses[:, :-1].reshape(-1, WORDS), words[:, 1:].reshape(-1))


def test_a_custom_architecture_is_fully_fused() -> None:
    torch.manual_seed(0)
    model = Delta()
    words = torch.randint(0, WORDS, (2, 9))
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(model(words), trained)
    fastlora.compile(model, strict=True)
    found = torch.autograd.grad(model(words), trained)
    assert all(relative(mine, truth) < 2e-6 for mine, truth in zip(found, expected, strict=True))
    coverage = {name: (each.fused, each.seen) for name, each in fastlora.report(model).coverage.items()}
    layers = len(model.strata)
    assert coverage == {
        "lora": (7 * layers, 7 * layers),
        "norm": (2 * layers, 2 * layers),
        "rotary": (2 * layers, 2 * layers),
        "glu": (layers, layers),
        "loss": (1, 1),
    }


def _reference(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _backward(wanted: dict[str, bool], grads: list[Tensor], x: Tensor) -> dict[str, Tensor]:
    return {"x": grads[0] * 2 * F.relu(x)}


squared_relu = register_op(
    "squared_relu",
    family="activation",
    schema="(Tensor x) -> (Tensor y)",
    outputs=1,
    reference=_reference,
    forward=lambda x: (F.relu(x).square(),),
    backward=_backward,
    saves=("x",),
)


spell("relu", "input inplace=False", F.relu, torch.relu, "relu")


@rule(squared_relu, anchor="relu")
def squared(x):
    active = Op("relu", input=x)
    return active * active


class Squared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)

    def forward(self, signal: Tensor) -> Tensor:
        active = F.relu(self.up(signal))
        return self.down(active * active)


def test_custom_ops_and_rules_are_used() -> None:
    torch.manual_seed(0)
    model, x = Squared(), torch.randn(5, WIDTH)
    expected = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
    fastlora.compile(model, rules=[*fastlora.default_rules(), squared], strict=True, verify=True)
    found = torch.autograd.grad(model(x).sin().sum(), list(model.parameters()))
    assert all(relative(mine, truth) < 1e-6 for mine, truth in zip(found, expected, strict=True))
    report = fastlora.report(model)
    assert report.coverage["activation"].fused == report.coverage["activation"].seen == 1
    assert "squared_relu" in next(iter(report.code.values()))
