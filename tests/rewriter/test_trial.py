"""A step can be repeated: in float64, without dropout, with perturbed parameters, and with equal results."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import batch, build, relative
from torch import Tensor, nn

from fastlora.checking.trial import NoLossError, Step, Trial


def steps(trial: Trial, *seeds: int, **options: Any) -> list[Step]:
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        found.append(trial.step({}, **options))
    return found


def dropping() -> nn.Module:
    model = build("llama", dropout=0.3).train()
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    return model


def test_steps_with_the_same_random_state_are_equal() -> None:
    one, same, other = steps(Trial(dropping(), (), batch()), 1, 1, 2)
    assert torch.equal(one.loss, same.loss)
    assert not torch.equal(one.loss, other.loss)


def test_dropout_is_off_where_masks_would_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dropping()
    trial = Trial(model, (), batch())
    monkeypatch.setattr(trial, "_keep_dropout", False)
    one, other = steps(trial, 1, 2)
    assert torch.equal(one.loss, other.loss)
    assert torch.equal(one.loss, model.eval()(**batch()).loss.detach())
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3}
    assert {m.attention_dropout for m in model.modules() if hasattr(m, "attention_dropout")} == {0.3}


def test_dropout_is_the_same_in_float64() -> None:
    trial = Trial(dropping(), (), batch())
    (eager,), (exact,) = steps(trial, 1), steps(trial, 1, exact=True)
    assert {g.dtype for g in exact.gradients.values()} == {torch.float64}
    assert relative(eager.loss, exact.loss) < 1e-6
    assert all(relative(g, exact.gradients[name]) < 1e-5 for name, g in eager.gradients.items())


def test_grouped_experts_run_one_by_one_in_float64() -> None:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, experts_implementation="grouped_mm",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(config)
    trial = Trial(model, (), batch())
    (eager,), (exact,) = steps(trial, 1), steps(trial, 1, exact=True)
    assert relative(eager.loss, exact.loss) < 1e-6
    assert model.config._experts_implementation == "grouped_mm"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_perturbed_steps_differ_slightly_and_start_equal_in_float64(dtype: torch.dtype) -> None:
    trial = Trial(build("llama", dtype), (), batch())
    plain, one, same, other = (trial.step({}, seed=seed) for seed in (0, 1, 1, 2))
    exact = [trial.step({}, exact=True, seed=seed) for seed in (0, 1)]
    assert torch.equal(one.loss, same.loss)
    for far in (plain, other):
        name = next(name for name in one.gradients if "lora_A" in name)
        assert 1e-3 < relative(one.gradients[name], far.gradients[name]) < 0.3
    rounding = 1e-6 if dtype == torch.float32 else 1e-2
    assert relative(plain.loss, exact[0].loss) < rounding
    assert relative(one.loss, exact[1].loss) < rounding


def test_zero_adapters_get_gradients_for_both_matrices() -> None:
    model = build("llama")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    trial = Trial(model, (), batch())
    assert "21 trained parameters are all zeros" in trial.notes[0]
    eager, exact = trial.step({}), trial.step({}, exact=True)
    assert all(g.any() for g in eager.gradients.values())
    assert relative(eager.loss, exact.loss) < 1e-6
    assert not any(p.any() for name, p in model.named_parameters() if "lora_B" in name)


def test_gradients_of_a_small_float16_loss_are_not_zero() -> None:
    class Faint(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, dtype=torch.float16))

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight * 1e-4 * x).float().sum() * 1e-4

    (gradient,) = Trial(Faint(), (torch.ones(4),), {}).step({}).gradients.values()
    assert gradient.dtype == torch.float16
    assert relative(gradient, torch.full((4,), 1024e-8)) < 1e-2


def test_a_step_writes_to_nothing_outside_the_trial() -> None:
    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))
            self.last, self.aside = torch.zeros(4), torch.ones(4, requires_grad=True)

        def forward(self, x: Tensor) -> Tensor:
            x.mul_(2)
            self.last.copy_(x)
            return (self.weight * x * self.aside).sum()

    model, given, outer = Keeping(), torch.ones(4), torch.ones((), requires_grad=True)
    step = Trial(model, (given,), {}, loss_fn=lambda loss: loss * outer).step({})
    assert torch.equal(step.gradients["weight"], torch.full((4,), 2.0))
    assert outer.grad is model.aside.grad is model.weight.grad is None
    assert torch.equal(given, torch.ones(4))
    assert torch.equal(model.last, torch.zeros(4))


@pytest.mark.parametrize("output", [None, {}, {"loss": None}, torch.ones(2, requires_grad=True), torch.ones(())])
def test_an_invalid_loss_is_an_error(output: Any) -> None:
    model = nn.Linear(1, 1)
    model.forward = lambda: output
    with pytest.raises(NoLossError):
        Trial(model, (), {}).step({})
