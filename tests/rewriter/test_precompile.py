"""The kernels that a model's graphs will launch are known before they run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastlora

MAY_DIFFER = {"cross_entropy_kernel", "rotary_kernel"}
"""Kernels that may be predicted wrongly: the loss is assumed to be a mean over float32 logits without a soft-cap, and
gradients are assumed to have the layouts of results."""
SCRIPT = Path(__file__).parents[1] / "predicted_launches.py"


def test_kernels_of_both_directions_and_the_loss_are_predicted() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    norms_units_and_rotary = {"forward_kernel", "backward_kernel", "rotary_kernel"}
    loss = {"rank_kernel", "gather_kernel", "cross_entropy_kernel", "scatter_kernel", "multiply_kernel"}
    assert found.keys() >= norms_units_and_rotary | loss


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are compiled for the GPU at hand")
@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_all_kernels_of_a_first_step_are_precompiled(
    family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from tiny_models import batch, build
    from triton import knobs
    from triton.runtime.jit import JITFunction

    late: list[str] = []
    compile_ = JITFunction._do_compile

    def spy(kernel: JITFunction, *args: object) -> object:
        if not args[-1]:  # a launch, not a warm-up
            late.append(kernel.fn.__name__)
        return compile_(kernel, *args)

    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(JITFunction, "_do_compile", spy)
    model = fastlora.compile(build(family).cuda().bfloat16())
    inputs = {k: v.cuda() for k, v in batch(24).items()}
    model(**inputs).loss.backward()
    assert not [note for note in fastlora.report(model).notes if "ahead" in note]
    assert set(late) <= (MAY_DIFFER if family != "llama" else set())
