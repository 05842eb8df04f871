"""`torch.compile(model, backend="fastlora")` works without importing fastlora."""

import subprocess
import sys

import pytest
import torch
from tiny_models import batch, build, relative, step

import fastlora

PROGRAM = """
import sys, torch
assert "fastlora" not in sys.modules
layer = torch.compile(torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8)), backend="fastlora")
layer(torch.randn(3, 8)).sum().backward()
assert "fastlora" in sys.modules
"""


def test_the_backend_is_found_without_importing_fastlora():
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, cwd="/")


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "bert"])
def test_a_model_traced_whole_equals_eager_and_its_loss_is_fused(family):
    model = build(family)
    inputs = batch() if family == "bert" else {**batch(), "use_cache": False}
    eager = step(model, inputs)
    found = step(torch.compile(model, backend="fastlora"), inputs)
    assert relative(found.loss, eager.loss) < 1e-6
    for name, gradient in eager.gradients.items():
        assert relative(found.gradients[f"_orig_mod.{name}"], gradient) < 3e-6
    report = fastlora.report()
    assert report.coverage["lora"].fused == report.coverage["lora"].seen > 0
    assert report.coverage["loss"].fused > 0


def test_inductor_compiles_the_rest_of_the_graph(monkeypatch):
    model = build("llama", lora_bias=False)
    eager = step(model, batch())
    found = step(fastlora.compile(model, lower="inductor"), batch())
    assert relative(found.loss, eager.loss) < 1e-6
    assert max(relative(found.gradients[n], eager.gradients[n]) for n in eager.gradients) < 5e-6


def test_an_unknown_option_is_named():
    compiled = torch.compile(torch.nn.Sequential(torch.nn.Linear(4, 4)), backend="fastlora", options={"speed": 11})
    with pytest.raises(Exception, match="speed"):
        compiled(torch.randn(2, 4))


def test_a_check_of_the_first_step_needs_a_model():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 4))
    compiled = torch.compile(layer, backend="fastlora", options={"verify": "first-step"})
    with pytest.raises(Exception, match=r"use fastlora\.compile\(model, verify='first-step'\)"):
        compiled(torch.randn(2, 4))
