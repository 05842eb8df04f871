"""The output folder is written completely or not at all, and other files are never deleted."""

import json
from pathlib import Path

import pytest

from fastlora.tools.errors import RunError, UsageError
from fastlora.tools.output import ADAPTER, COMMAND, SUMMARY, check_output, output_folder


def earlier_run(folder: Path) -> Path:
    (folder / ADAPTER).mkdir(parents=True)
    (folder / SUMMARY).write_text(json.dumps({"command": COMMAND, "run": "earlier"}))
    return folder


def run_name(folder: Path) -> str:
    return json.loads((folder / SUMMARY).read_text())["run"]


def write_run(output: Path, name: str, stop: type[BaseException] | None = None) -> None:
    with output_folder(output) as folders:
        (folders.results / SUMMARY).write_text(json.dumps({"command": COMMAND, "run": name}))
        if stop is not None:
            raise stop


def test_temporary_folders_are_deleted(tmp_path: Path) -> None:
    with output_folder(tmp_path / "out") as folders:
        folders.scratch.mkdir()
        (folders.scratch / "checkpoint").write_text("x")
        (folders.results / SUMMARY).write_text("{}")
        assert not (tmp_path / "out").exists()
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["out", f"out/{SUMMARY}"]


def test_earlier_runs_and_empty_folders_are_replaced(tmp_path: Path) -> None:
    write_run(earlier_run(tmp_path / "out"), "new")
    assert run_name(tmp_path / "out") == "new"
    assert not (tmp_path / "out" / ADAPTER).exists()
    (tmp_path / "empty").mkdir()
    write_run(tmp_path / "empty", "new")
    assert run_name(tmp_path / "empty") == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "out"]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_a_run_that_fails_changes_nothing(tmp_path: Path, stop: type[BaseException]) -> None:
    output = earlier_run(tmp_path / "out")
    with pytest.raises(stop):
        write_run(output, "new", stop)
    assert run_name(output) == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_earlier_results_are_kept_if_the_new_ones_cannot_be_moved(tmp_path: Path) -> None:
    output = earlier_run(tmp_path / "out")
    with pytest.raises(RunError, match="could not be written"), output_folder(output) as folders:
        folders.results.rmdir()  # the rename fails
    assert run_name(output) == "earlier"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_files_that_appear_during_the_run_are_not_deleted(tmp_path: Path) -> None:
    output = earlier_run(tmp_path / "out")
    with pytest.raises(UsageError, match="not from a fastlora run"), output_folder(output):
        (output / "thesis.txt").write_text("precious")
    assert (output / "thesis.txt").read_text() == "precious"


def test_folders_with_other_files_are_rejected(tmp_path: Path) -> None:
    output = earlier_run(tmp_path / "out")
    check_output(output)
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="not from a fastlora run"):
        check_output(output)


@pytest.mark.parametrize("summary", ["", "[]", '{"command": "other"}'])
def test_folders_with_another_summary_are_rejected(tmp_path: Path, summary: str) -> None:
    (tmp_path / SUMMARY).write_text(summary)
    with pytest.raises(UsageError, match="not from a fastlora run"):
        check_output(tmp_path)


def test_invalid_output_folders_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="is a file"):
        check_output(tmp_path / "file")
    with pytest.raises(UsageError, match="does not exist; create it first"):
        check_output(tmp_path / "missing" / "out")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is the current folder"):
        check_output(Path("."))
