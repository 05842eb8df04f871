"""`fastlora doctor`: what fastlora finds on this machine, and whether its kernels are correct here."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastlora import kernels as kernels_package
from fastlora.compat.probes.run import failures
from fastlora.kernels.core.devices import runs_kernels
from fastlora.tools.errors import RunError, UsageError

PACKAGES = ("fastlora-fx", "torch", "triton", "transformers", "peft", "accelerate", "trl", "bitsandbytes")
NEEDED = ("pytest", "hypothesis", "sympy")
_BESIDE = Path(kernels_package.__file__).parents[1]
_TESTS = (_BESIDE / "kernel_tests", _BESIDE / "tests" / "kernels")
"""Where the kernels' tests are: in an installed package, and in a checkout."""


def doctor(console: Console, kernels: bool, verbose: bool) -> None:
    """Print versions, devices and private APIs of PyTorch that changed; with `kernels`, test the kernels on the GPU.

    Raises:
        RunError: if a test fails, or no GPU here runs kernels.
        UsageError: if the packages that tests need are missing.
    """
    console.print(_findings())
    _check_private_apis(console)
    if not kernels:
        return
    if not any(runs_kernels(device) for device in _gpus()):
        raise RunError("doctor --kernels: no GPU here runs Triton kernels; ops use their PyTorch form")
    missing = [package for package in NEEDED if find_spec(package) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} not installed; run: pip install 'fastlora-fx[test]'")
    if run_tests(verbose) != 0:
        raise RunError("doctor --kernels: a kernel is wrong on this machine; please report the output above")
    console.print("[green]all kernels are correct on this machine")


def _check_private_apis(console: Console) -> None:
    """Say whether the private APIs of PyTorch that fastlora relies on are as it expects them."""
    changed = failures()
    for line in changed:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if changed:
        raise RunError(
            f"doctor: {len(changed)} private APIs of PyTorch {torch.__version__} changed; please report this"
        )
    console.print(f"All private APIs of PyTorch {torch.__version__} that fastlora relies on are as expected.")


def _gpus() -> list[torch.device]:
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def _findings() -> Table:
    table = Table(show_header=False, title="fastlora doctor")
    table.add_row("Python", sys.version.split()[0])
    for package in PACKAGES:
        table.add_row(package, _version(package))
    for device in _gpus():
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
        form = "Triton kernels" if runs_kernels(device) else "PyTorch forms"
        table.add_row(str(device), f"{torch.cuda.get_device_name(device)}, compute capability {capability}: {form}")
    if not _gpus():
        table.add_row("GPU", "none that PyTorch sees: ops use their PyTorch forms")
    return table


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def run_tests(verbose: bool) -> int:
    """Run the tests that ship with the package, in a process and an empty folder of their own; return the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(command(folder, verbose), cwd=folder, check=False).returncode


def command(folder: str, verbose: bool) -> list[str]:
    """Return the command that runs the tests, with settings that are written to `folder`."""
    tests = next(path for path in _TESTS if path.is_dir())
    settings = Path(folder) / "pytest.ini"
    settings.write_text(f"[pytest]\npythonpath = {tests}\naddopts = --import-mode=importlib -p no:cacheprovider\n")
    elsewhere = f"--ignore={tests / 'test_compiles_for_gpus.py'}"  # it compiles for other GPUs than this machine's
    parallel = ["-n", "4", "--dist", "loadfile"] if find_spec("xdist") is not None else []
    return [
        *(sys.executable, "-m", "pytest", "-c", str(settings), str(tests), elsewhere, *parallel),
        "-v" if verbose else "-q",
    ]
