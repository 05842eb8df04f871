"""`fastlora explain`: the printed and written report."""

import json
import os
from pathlib import Path

import pytest

from fastlora.tools.builtin_model import build_model, build_tokenizer
from fastlora.tools.cli import main


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    path = tmp_path / "own"
    build_model(1, hidden_size=16, layers=1).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def test_the_report_is_printed_and_written(
    tmp_path: Path, own_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "current"
    folder.mkdir()
    monkeypatch.chdir(folder)
    arguments = ["--batch-size", "2", "--max-length", "48", "--json", "report.json", "--html", "report.html"]
    assert main(["explain", "--model", str(own_model), *arguments]) == 0
    assert "lora" in capsys.readouterr().out.lower()
    assert isinstance(json.loads((folder / "report.json").read_text()), dict)
    assert "<" in (folder / "report.html").read_text()
    assert sorted(os.listdir(folder)) == ["report.html", "report.json"]


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_a_folder_in_place_of_a_report_file_is_a_usage_error(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", option, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option} {tmp_path}")
    assert error.count("\n") == 1
