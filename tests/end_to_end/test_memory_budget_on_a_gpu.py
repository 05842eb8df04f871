"""On a GPU, offloaded activations are bit-identical when they come back, next to everything else that runs there."""

from __future__ import annotations

import pytest
import torch
from tiny_models import batch, build
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastlora
from fastlora.runtime import activation_offload, memory_budget

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def losses_and_gradients(budget: str | int | None, dtype: torch.dtype, steps: int = 6) -> list[torch.Tensor]:
    model = build("llama", dtype).cuda()
    fastlora.compile(model, memory_budget=budget, mode="no-cudagraphs")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for i in range(steps):
        inputs = {name: value.cuda() for name, value in batch(length=48, rows=8, seed=i).items()}
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cuda", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        found += [loss.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("budget", [0, "100KB", "1GB"])
@pytest.mark.parametrize("ahead", [0, 30_000])
def test_training_is_bit_identical(budget: str | int, ahead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_offload, "MIN_BYTES", 1)
    monkeypatch.setattr(activation_offload, "PREFETCH_BYTES", ahead)
    monkeypatch.setattr(memory_budget, "MAX_PENDING", 0)
    for dtype in (torch.float32, torch.bfloat16):
        plain, mine = losses_and_gradients(None, dtype), losses_and_gradients(budget, dtype)
        assert len(plain) == len(mine)
        assert all(torch.equal(a, b) for a, b in zip(plain, mine, strict=True))


def test_a_budget_lowers_the_peak() -> None:
    torch.manual_seed(0)

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(256, 256)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.sin(torch.exp(-self.layer(x).square()))

    model = torch.nn.Sequential(*(Block() for _ in range(8))).cuda()
    x = torch.randn(1 << 14, 256, device="cuda")  # 16 MiB, of which a block keeps several
    peaks = []
    for budget in (None, 0):
        fastlora.compile(model, memory_budget=budget, mode="no-cudagraphs")
        for _ in range(3):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()  # memory of other tests counts as well
            model(x).sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.8 * peaks[0]
