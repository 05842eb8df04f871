"""Every kernel compiles for each generation of GPUs, fits into their shared memory and spills no registers.

Compilation runs in a separate process, since kernels are defined for the interpreter in this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CAPABILITIES = [70, 75, 80, 86, 89, 90, 100]


def test_every_kernel_compiles_without_spills(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_for_gpus.py")
    command = [sys.executable, script, *map(str, CAPABILITIES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, "\n".join(line for line in done.stdout.splitlines() if "ok" not in line) + done.stderr
