"""Each way to train of `fastlora zoo`, with two models: compiled gradients equal eager's.

`docs/results/ways.md` has the results for all causal language models.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastlora.tools.zoo import compare as zoo
from fastlora.tools.zoo.architectures import architectures
from fastlora.tools.zoo.compare import DIFFERENT, EQUAL, compare
from fastlora.tools.zoo.page import NO_RULE
from fastlora.tools.zoo.ways import WAYS

OTHERS = ("gemma2", "qwen3", "phi3", "granite", "olmo2", "glm4", "mixtral")
PAIRS = [(way, name) for i, way in enumerate(WAYS) for name in ("llama", OTHERS[i % len(OTHERS)])]
PAIRS += [("experts", name) for name in ("mixtral", "gpt_oss")]
PAIRS += [("eva", "bert:AutoModelForMaskedLM"), ("prefix", "whisper")]
UNFUSED = ("adalora", "prefix")
"""Ways in which layers of other tuners, or a KV cache, keep blocks from being fused entirely."""


@pytest.mark.parametrize(("way", "name"), PAIRS)
def test_compiled_gradients_equal_eager_gradients(way: str, name: str) -> None:
    result = compare(architectures()[name], WAYS[way])
    assert result["verdict"] == EQUAL, result["problem"]
    if way not in UNFUSED:
        assert {why: count for why, count in result["missed"].items() if not why.endswith(NO_RULE)} == {}


@pytest.mark.parametrize(("way", "last"), [("plain", 3 + zoo.BATCHES), ("bfloat16", 2 + zoo.BATCHES)])
def test_a_wrong_gradient_is_detected(way: str, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stepped, calls, largest = zoo._step, [], []

    def wrong(*args: object) -> zoo._Step:
        result = stepped(*args)  # type: ignore[arg-type]
        calls.append(1)
        is_reference = next(iter(result.gradients.values())).dtype is torch.float64
        if 2 <= len(calls) <= last and not is_reference:  # the compiled steps, after the eager one
            largest.append(max(result.gradients, key=lambda each: float(result.gradients[each].norm())))
            name = largest[0]  # the same in all batches
            result.gradients[name] = result.gradients[name] * 1.5
        return result

    monkeypatch.setattr(zoo, "_step", wrong)
    assert compare(architectures()["llama"], WAYS[way])["verdict"] == DIFFERENT


class InfiniteGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(()))

    def forward(self) -> SimpleNamespace:
        return SimpleNamespace(loss=self.x.sqrt())


def test_infinite_eager_gradients_are_an_error() -> None:
    with pytest.raises(ArithmeticError, match="1 gradients are not finite"):
        zoo._step(InfiniteGradient(), {})
