"""Whatever PEFT is set to and whatever a loop does around a step, compiled gradients are eager's.

Each way to train with two models here; `fastlora zoo --way all` takes any, and `docs/results/ways.md` has what it
found.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastlora.tools.zoo import examine as zoo
from fastlora.tools.zoo.examine import DIFFERENT, EQUAL, examine
from fastlora.tools.zoo.kinds import kinds
from fastlora.tools.zoo.page import UNCOVERED
from fastlora.tools.zoo.ways import WAYS

OTHERS = ("gemma2", "qwen3", "phi3", "granite", "olmo2", "glm4", "mixtral")
PAIRS = [(way, name) for i, way in enumerate(WAYS) for name in ("llama", OTHERS[i % len(OTHERS)])]
PAIRS += [("experts", name) for name in ("mixtral", "gpt_oss")]
PAIRS += [("eva", "bert:AutoModelForMaskedLM"), ("prefix", "whisper")]
UNFUSED = ("adalora", "prefix")
"""Where other tuners' layers, or a cache, keep blocks from being fused entirely."""


@pytest.mark.parametrize(("way", "name"), PAIRS)
def test_compiled_gradients_are_eagers(way: str, name: str) -> None:
    found = examine(kinds()[name], WAYS[way])
    assert found["verdict"] == EQUAL, found["problem"]
    if way not in UNFUSED:
        assert {why: count for why, count in found["missed"].items() if not why.endswith(UNCOVERED)} == {}


@pytest.mark.parametrize(("way", "last"), [("plain", 3 + zoo.BATCHES), ("bfloat16", 2 + zoo.BATCHES)])
def test_a_wrong_gradient_is_found(way: str, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped, calls, largest = zoo._step, [], []

    def wrong(*args: object) -> zoo._Step:
        result = stepped(*args)  # type: ignore[arg-type]
        calls.append(1)
        exact = next(iter(result.gradients.values())).dtype is torch.float64
        if 2 <= len(calls) <= last and not exact:  # after eager's, the compiled ones
            largest.append(max(result.gradients, key=lambda each: float(result.gradients[each].norm())))
            name = largest[0]  # the same in all batches
            result.gradients[name] = result.gradients[name] * 1.5
        return result

    monkeypatch.setattr(zoo, "_step", wrong)
    assert examine(kinds()["llama"], WAYS[way])["verdict"] == DIFFERENT


class Cusp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(()))

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(loss=self.x.sqrt())


def test_gradients_that_are_no_numbers_in_eager_say_nothing() -> None:
    with pytest.raises(ArithmeticError, match="1 gradients are not finite"):
        zoo._step(Cusp(), {})
