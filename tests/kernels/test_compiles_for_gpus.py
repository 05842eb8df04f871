from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CAPABILITIES = [70, 75, 80, 86, 89, 90, 100]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_kernel_compiles_fits_and_does_not_spill(capability: int, tmp_path: Path) -> None:
    """In a process of its own, as kernels are defined for the interpreter in this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_for_gpus.py")
    done = subprocess.run(
        [sys.executable, script, str(capability)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "ok" not in line) + done.stderr
