"""`fastlora check`: the printed and written result, and the exit code."""

import json
import os
from pathlib import Path

import pytest

import fastlora
from fastlora.checking import check
from fastlora.kernels import ops
from fastlora.match.dsl import silu
from fastlora.match.rule import dtype_of, rule
from fastlora.tools.builtin_model import build_model, build_tokenizer
from fastlora.tools.cli import main

SMALL = ["--batch-size", "2", "--max-length", "48"]


@pytest.fixture
def own_model(tmp_path: Path) -> str:
    path = tmp_path / "own"
    build_model(1, hidden_size=64, layers=2).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return str(path)


def test_a_right_step_is_printed_and_written(
    tmp_path: Path, own_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "current"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert main(["check", "--model", own_model, *SMALL, "--dropout", "0.1", "--json", "check.json"]) == 0
    assert capsys.readouterr().out.startswith("right: the loss and 28 gradients")
    assert os.listdir(folder) == ["check.json"]
    written = json.loads((folder / "check.json").read_text())
    assert written["right"] is True
    assert written["loss"]["float64"] == pytest.approx(written["loss"]["compiled"], rel=1e-5)


def test_a_right_step_with_4_bit_weights_is_printed(own_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes")
    assert main(["check", "--model", own_model, *SMALL, "--load-in-4bit", "--no-defer-logits"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("right: ")
    assert "Params4bit" in printed


def test_a_wrong_step_exits_with_code_1(
    own_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @rule(ops.glu, attrs={"activation": "gelu", "out_dtype": dtype_of()})
    def wrong(gate, up):
        return silu(gate) * up

    class Wrong(check.Session):
        def __init__(self, options: object, rules: object) -> None:
            super().__init__(options, [wrong])

    monkeypatch.setattr(check, "Session", Wrong)
    assert main(["check", "--model", own_model, *SMALL]) == 1
    output = capsys.readouterr()
    assert output.out.startswith("wrong: ")
    assert "gate_proj.lora_B.default.weight: error of eager" in output.out
    assert output.err.startswith("error: the compiled step differs from the eager one")


def test_errors_of_fastlora_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fastlora.FastLoRAError("a message")

    monkeypatch.setattr(fastlora, "check", fail)
    assert main(["check", *SMALL]) == 1
    assert capsys.readouterr().err == "error: fastlora stopped: a message\n"


@pytest.mark.parametrize("arguments", [["--json", "."], ["--dropout", "1"], ["--model", "./nowhere"], ["--nonsense"]])
def test_invalid_arguments_exit_with_code_2_and_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
