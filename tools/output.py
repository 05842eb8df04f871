"""The output folder: results are written to a temporary folder next to it, which replaces it if the run succeeds."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastlora.tools.errors import RunError, UsageError, one_line

COMMAND = "fastlora finetune"
SUMMARY, CURVES, ADAPTER = "summary.json", "losses.png", "adapter"


@dataclass(frozen=True)
class Folders:
    """Temporary folders of a run: `results` becomes the output folder, `scratch` is deleted."""

    results: Path
    scratch: Path


def check_output(output: Path) -> Path:
    """Return the absolute path of the output folder.

    Raises:
        UsageError: if it cannot be created, or replacing it would delete files that are not from an earlier run.
    """
    target = output.resolve()
    if target.exists() and not target.is_dir():
        raise UsageError(f"--output {output}: is a file; name a folder")
    if target == Path.cwd():
        raise UsageError(f"--output {output}: is the current folder, which cannot be replaced; name another folder")
    if not target.parent.is_dir():
        raise UsageError(f"--output {output}: the folder {target.parent} does not exist; create it first")
    if target.exists() and any(target.iterdir()) and not _is_earlier_run(target):
        raise UsageError(f"--output {output}: holds files that are not from a fastlora run; name another folder")
    return target


def check_file(option: str, path: Path | None) -> None:
    """Raise `UsageError`, naming the option, if a file of this name cannot be written."""
    if path is not None and (path.is_dir() or not path.resolve().parent.is_dir()):
        raise UsageError(f"{option} {path}: not a file in an existing folder; name another file")


def _is_earlier_run(folder: Path) -> bool:
    if {entry.name for entry in folder.iterdir()} - {SUMMARY, CURVES, ADAPTER}:
        return False
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(summary, dict) and summary.get("command") == COMMAND


@contextmanager
def output_folder(output: Path) -> Iterator[Folders]:
    """Make temporary folders. If the block succeeds, `results` replaces `output`; otherwise `output` is unchanged."""
    target = check_output(output)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as problem:
        raise UsageError(f"--output {output}: cannot be written ({problem.strerror}); name another folder") from problem
    folders = Folders(temporary / "results", temporary / "scratch")
    try:
        folders.results.mkdir()
        yield folders
        with writing(output):
            _replace(target, folders.results, backup=temporary / "earlier")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write, such as a full disk, into a `RunError`."""
    try:
        yield
    except OSError as problem:
        raise RunError(f"{path} could not be written: {one_line(problem)}") from problem


def _replace(target: Path, results: Path, *, backup: Path) -> None:
    """Rename the target to a backup and the results to the target. If that fails, the backup is renamed back."""
    check_output(target)  # again: other files may have been written to it during the run
    exists = target.exists()
    if exists:
        target.rename(backup)
    try:
        results.rename(target)
    except OSError:
        if exists:
            backup.rename(target)
        raise
