"""Compiled blocks that checkpoint themselves have the gradients and buffers of eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastlora


class Block(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.statistics = nn.BatchNorm1d(8)
        self.reentrant = reentrant

    def _whole(self, x: Tensor) -> Tensor:
        return x + self.statistics(torch.relu(self.inner(x)))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = checkpoint(self._whole, x, use_reentrant=self.reentrant)
        return made


class Blocks(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(reentrant) for _ in range(3))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        loss: Tensor = self.head(x).square().mean()
        return loss


def adapted(reentrant: bool) -> Any:
    torch.manual_seed(0)
    model: Any = get_peft_model(Blocks(reentrant), LoraConfig(r=2, target_modules=["inner", "head"]))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def trained(model: Any, x: Tensor) -> dict[str, Tensor]:
    """Return the gradients after a step, and the buffers."""
    for _ in range(2):
        model.zero_grad()
        model(x).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients | dict(model.named_buffers())


@pytest.mark.parametrize("leads_back", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_batch_statistics_may_change_before_a_block_is_recomputed(reentrant: bool, leads_back: bool) -> None:
    """With reentrant checkpoints a block has gradients only if one of its inputs requires one, as in eager."""
    eager = adapted(reentrant)
    model = fastlora.compile(copy.deepcopy(eager))
    x = torch.randn(5, 8, requires_grad=leads_back)
    expected, found = trained(eager, x), trained(model, x)
    assert expected.keys() == found.keys()
    assert any("blocks" in name and "lora_A" in name for name in expected) == (leads_back or not reentrant)
    for name, value in expected.items():
        assert torch.allclose(value, found[name], rtol=1e-5, atol=1e-7), name
    assert fastlora.report(model).coverage["lora"].fused == 3


def test_a_changed_activation_raises_on_recomputation_as_in_eager() -> None:
    def refuses(model: Any) -> bool:
        x = torch.randn(5, 8)
        loss = model(x)
        with torch.no_grad():
            x += 1
        try:
            loss.backward()
        except RuntimeError as problem:
            return "modified by an inplace operation" in str(problem)
        return False

    eager = adapted(reentrant=False)
    assert refuses(fastlora.compile(copy.deepcopy(eager))) == refuses(eager)


ASKED: list[Any] = []


def keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    ASKED.append(op)
    return CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.addmm.default else CheckpointPolicy.PREFER_RECOMPUTE


def selective() -> Any:
    return create_selective_checkpoint_contexts(keep_products)


class Selective(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def _whole(self, x: Tensor) -> Tensor:
        return torch.relu(self.inner(x))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = checkpoint(self._whole, x, use_reentrant=False, context_fn=selective)
        return made


def test_a_selective_checkpoint_policy_is_respected() -> None:
    eager = nn.ModuleList([Selective(), Selective()])
    model = fastlora.compile(copy.deepcopy(eager), defer_logits=False)
    gradients, x = [], torch.randn(5, 8)
    for each in (eager, model):
        ASKED.clear()
        each[0](x).sum().backward()
        gradients.append([p.grad for p in each[0].parameters()])
        assert torch.ops.aten.addmm.default in ASKED
    assert all(map(torch.allclose, *gradients))
    report = fastlora.report(model)
    assert report.graphs == 1
    assert not report.breaks
