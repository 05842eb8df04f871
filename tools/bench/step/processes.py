"""Running a worker in a process of its own, with a timeout."""

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


def run_worker(role: str, folder: Path, log: Path, timeout: float, **arguments: Any) -> dict[str, Any]:
    """Run a role of `worker` and return its result, or {"error": message} if it fails; its output goes to `log`.

    Each worker starts with empty compile caches, so that its first step is cold.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix="worker-", ignore_cleanup_errors=True) as name:
        own_folder = Path(name)
        spec, result = own_folder / "spec.json", own_folder / "result.json"
        spec.write_text(
            json.dumps({"role": role, "folder": str(folder), "result": str(result), "arguments": arguments})
        )
        with open(log, "w") as output:
            code = _run([sys.executable, "-m", WORKER, str(spec)], own_folder, output, timeout)
        if code is None:
            return {"error": f"stopped after --timeout {timeout:g} seconds"}
        if not result.exists():
            return {"error": f"ended with exit code {code}: {_last_line(log)}"}
        return json.loads(result.read_text())


def _run(command: list[str], folder: Path, output: Any, timeout: float) -> int | None:
    """Return the exit code, or None after the timeout. Everything that the process has started is stopped with it."""
    with _sigterm_raises():
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=_environment(folder),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _stop(process)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that `_stop` runs. The worker has its own session and would keep running."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set signal handlers
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Kill the worker's session, with any compiler processes that a library has left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment(folder: Path) -> dict[str, str]:
    """Return an environment with empty compile caches, an offline hub, and a PYTHONPATH of absolute paths."""
    paths = [str(Path(entry).resolve()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "HF_HUB_OFFLINE": "1",
        "UNSLOTH_DISABLE_STATISTICS": "1",
    }


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it printed nothing"
