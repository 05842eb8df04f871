"""`fastlora doctor`: versions, devices, private APIs, and running the kernels' tests."""

from __future__ import annotations

import subprocess

import pytest
import torch

from fastlora.tools import doctor
from fastlora.tools.cli import main


def test_doctor_prints_versions_and_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "GPU" in printed or "cuda:0" in printed


def test_doctor_reports_changed_private_apis(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["doctor"]) == 0
    assert "All private APIs of PyTorch" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "failures", lambda: ["fastlora.compat.autograd (x): gone"])
    assert main(["doctor"]) == 1
    printed = capsys.readouterr()
    assert "fastlora.compat.autograd (x): gone" in printed.out
    assert "1 private APIs of PyTorch" in printed.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_cannot_be_tested_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--kernels"]) == 1
    assert "no GPU here runs Triton kernels" in capsys.readouterr().err


def test_the_shipped_tests_can_be_collected_from_anywhere(tmp_path) -> None:
    """`doctor --kernels` runs them in a folder without the pytest settings of the repository."""
    command = [*doctor.command(str(tmp_path), verbose=False), "--collect-only"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "test_rms_norm" in done.stdout
    assert "test_compiles_for_gpus" not in done.stdout
