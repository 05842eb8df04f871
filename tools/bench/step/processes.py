"""Starting a worker in a process of its own, and hearing how it went, whatever happens to it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WORKER = "fastlora.tools.bench.step.worker"


def work(role: str, folder: Path, log: Path, timeout: float, **arguments: Any) -> dict[str, Any]:
    """What a worker found in a role, or {"error": why it found nothing}; its output goes to `log`.

    Each worker has compile caches of its own, which are empty, so that first steps are cold.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="worker-", ignore_cleanup_errors=True) as own:
        place = Path(own)
        spec, result = place / "spec.json", place / "result.json"
        spec.write_text(
            json.dumps({"role": role, "folder": str(folder), "result": str(result), "arguments": arguments})
        )
        with open(log, "w") as output:
            ended = _run([sys.executable, "-m", WORKER, str(spec)], place, output, timeout)
        if ended is None:
            return {"error": f"stopped after --timeout {timeout:g} seconds"}
        if not result.exists():
            return {"error": f"ended with exit code {ended}: {_last_line(log)}"}
        return json.loads(result.read_text())


def _run(command: list[str], place: Path, output: Any, timeout: float) -> int | None:
    """The exit code; None after the timeout, when all that the process has started is stopped with it."""
    with _sigterm_raises():
        process = subprocess.Popen(
            command, cwd=place, env=_environment(place), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _stop(process)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """A worker has a session of its own, and would go on holding the GPU if this process were just ended."""
    if threading.current_thread() is not threading.main_thread():  # where Python lets nobody handle signals
        yield
        return
    usual = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the worker's session, with the compilers that a library may have left running in it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(place: Path) -> dict[str, str]:
    """Empty compile caches, no hub, and an import path that holds from any folder."""
    given = [str(Path(entry).resolve()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(given),
        "TORCHINDUCTOR_CACHE_DIR": str(place / "inductor"),
        "TRITON_CACHE_DIR": str(place / "triton"),
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it wrote nothing"
