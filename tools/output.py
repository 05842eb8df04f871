"""The output folder: written beside its final place and moved there only when all is well."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastlora.tools.problems import RunError, UsageError, one_line

COMMAND = "fastlora finetune"
SUMMARY, CURVES, ADAPTER = "summary.json", "losses.png", "adapter"


@dataclass(frozen=True)
class Workplace:
    """`results` becomes the output folder; `scratch` goes away in any case."""

    results: Path
    scratch: Path


def check_output(output: Path) -> Path:
    """The absolute output path, or a `UsageError` if writing there would harm what is there already."""
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
    """Raise `UsageError`, naming the option, if there can be no such file."""
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
def workplace(output: Path) -> Iterator[Workplace]:
    """Folders to work in. What is in `results` replaces `output` if the block succeeds; else nothing is left."""
    target = check_output(output)
    try:
        beside = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as problem:
        raise UsageError(f"--output {output}: cannot be written ({problem.strerror}); name another folder") from problem
    place = Workplace(beside / "results", beside / "scratch")
    try:
        place.results.mkdir()
        yield place
        with writing(output):
            _move_into_place(place.results, target, aside=beside / "earlier")
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write, such as a full disk, into a `RunError`."""
    try:
        yield
    except OSError as problem:
        raise RunError(f"{path} could not be written: {one_line(problem)}") from problem


def _move_into_place(results: Path, target: Path, *, aside: Path) -> None:
    """Two renames, the second undone if it fails, so that the earlier results are never lost."""
    check_output(target)  # again: the folder may have been filled while the model was trained
    replaces = target.exists()
    if replaces:
        target.rename(aside)
    try:
        results.rename(target)
    except OSError:
        if replaces:
            aside.rename(target)
        raise
