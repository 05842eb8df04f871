"""`fastlora finetune`: arguments, exit codes, messages and files."""

import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import fastlora
from fastlora.tools.builtin_model import build_model, build_tokenizer
from fastlora.tools.cli import main
from fastlora.tools.models import load_model
from fastlora.tools.settings import Settings

SMALL = ["finetune", "--steps", "4", "--batch-size", "4", "--max-length", "128", "--lower", "eager"]
GOOD_LINE = '{"prompt": "Say hello.", "completion": "Hello."}\n'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder, which is the current one."""
    empty = tmp_path / "current"
    empty.mkdir()
    monkeypatch.chdir(empty)
    return empty


@pytest.fixture(scope="module")
def own_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model and a tokenizer with a chat template, and return their folder."""
    path = tmp_path_factory.mktemp("models") / "own"
    build_model(1, hidden_size=16, layers=1).save_pretrained(path)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = (
        "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    tokenizer.save_pretrained(path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def usage_error(capsys: pytest.CaptureFixture[str], folder: Path, *arguments: str) -> str:
    """Run with invalid arguments, check that no file changes, and return the error, which must be one line."""
    before = contents(folder)
    capsys.readouterr()  # discard earlier output
    assert main(["finetune", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    assert contents(folder) == before
    return printed.err


def test_a_run_writes_adapter_plot_and_summary(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SMALL) == 0
    assert os.listdir(folder) == ["fastlora-run"]
    output = folder / "fastlora-run"
    assert sorted(os.listdir(output)) == ["adapter", "losses.png", "summary.json"]
    assert (output / "losses.png").read_bytes().startswith(b"\x89PNG")
    _check_summary(json.loads((output / "summary.json").read_text()))
    _check_adapter(output / "adapter")
    printed = capsys.readouterr()
    assert "without the first step" in " ".join(printed.out.split())
    assert printed.err == ""


def _check_summary(summary: dict) -> None:
    eager, fused = summary["eager"]["losses"], summary["fastlora"]["losses"]
    assert len(eager) == len(fused) == 4
    assert fused == pytest.approx(eager, abs=1e-5)
    assert fused[-1] < fused[0]
    assert summary["comparison"]["within_bound"] is True
    assert summary["comparison"]["largest_relative_difference"] < 1e-5
    for run in (summary["eager"], summary["fastlora"]):
        assert run["first_step_seconds"] > 0
        assert run["tokens_per_second_after_first_step"] > 0
        assert 4 * 4 < run["tokens"] <= 4 * 4 * 128
    assert any(item["fused"] > 0 for item in summary["coverage"].values())
    assert sum(summary["fused"].values()) > 0
    assert summary["peak_process_bytes"] > 2**20
    assert torch.__version__.startswith(summary["versions"]["torch"])  # without the local version in some installations
    assert summary["settings"]["rank"] == 16


def _check_adapter(path: Path) -> None:
    model = PeftModel.from_pretrained(build_model(0), path)
    trained = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert trained
    assert all(parameter.abs().sum() > 0 for parameter in trained)
    assert len(AutoTokenizer.from_pretrained(path)) == 259


def test_a_saved_model_trains_on_conversations_without_comparison(folder: Path, own_model: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n" + json.dumps({"messages": turns}) + "\n")
    arguments = ["--model", str(own_model), "--data", "chat.jsonl", "--output", "out", "--no-compare"]
    assert main([*SMALL, *arguments]) == 0
    summary = json.loads((folder / "out" / "summary.json").read_text())
    assert summary["eager"] is None
    assert summary["comparison"] is None
    assert len(summary["fastlora"]["losses"]) == 4
    assert summary["settings"]["learning_rate"] == 2e-4
    assert sorted(os.listdir(folder)) == ["chat.jsonl", "out"]


def test_a_second_run_replaces_the_first(folder: Path, own_model: Path) -> None:
    for seed in ("1", "2"):
        assert main([*SMALL, "--model", str(own_model), "--steps", "1", "--no-compare", "--seed", seed]) == 0
    assert os.listdir(folder) == ["fastlora-run"]
    assert json.loads((folder / "fastlora-run" / "summary.json").read_text())["settings"]["seed"] == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--steps", "many"], "--steps"),
        (["--batch-size", "-1"], "--batch-size -1"),
        (["--max-length", "1"], "--max-length 1"),
        (["--max-length", "2000"], "--max-length 2000: the built-in model supports at most 1024"),
        (["--max-length", "3"], "--max-length 3: no example"),
        (["--rank", "0"], "--rank 0"),
        (["--alpha", "0"], "--alpha 0"),
        (["--dropout", "1"], "--dropout 1"),
        (["--learning-rate", "0"], "--learning-rate 0"),
        (["--learning-rate", "nan"], "--learning-rate nan"),
        (["--seed", "-1"], "--seed -1"),
        (["--lower", "magic"], "--lower"),
        (["--unknown"], "--unknown"),
        (["--data", "missing.jsonl"], "missing.jsonl: no such file"),
        (["--data", "empty.jsonl"], "empty.jsonl: the file holds no examples"),
        (["--data", "broken.jsonl"], "broken.jsonl, line 2: not valid JSON"),
        (["--output", "file"], "--output file: is a file"),
        (["--output", "file/out"], "--output file/out"),
        (["--output", "full"], "--output full: holds files that are not from a fastlora run"),
        (["--model", "./missing"], "--model ./missing: no such folder"),
        (["--model", "full"], "--model full"),
    ],
)
def test_invalid_arguments_exit_with_code_2_and_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    (folder / "empty.jsonl").write_text("")
    (folder / "broken.jsonl").write_text(GOOD_LINE + '{"prompt": ')
    (folder / "file").write_text("x")
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    assert named in usage_error(capsys, folder, *arguments)


def test_a_damaged_model_is_a_usage_error(
    folder: Path, own_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    build_tokenizer().save_pretrained(damaged)
    (damaged / "config.json").write_text((own_model / "config.json").read_text())
    (damaged / "model.safetensors").write_bytes(b"not weights")
    assert f"--model {damaged}: cannot be loaded" in usage_error(capsys, folder, "--model", str(damaged))


def test_a_model_without_linear_layers_is_a_usage_error(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    LlamaForCausalLM(
        LlamaConfig(vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=0, num_attention_heads=1)
    ).save_pretrained(bare)
    build_tokenizer().save_pretrained(bare)
    assert "has no linear layers, or none that PEFT can adapt" in usage_error(capsys, folder, "--model", str(bare))


def test_a_tokenizer_with_too_many_tokens_is_a_usage_error(
    folder: Path, own_model: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    larger = tmp_path / "larger"
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["hello"])
    tokenizer.save_pretrained(larger)
    for name in ("config.json", "model.safetensors"):
        (larger / name).write_bytes((own_model / name).read_bytes())
    (folder / "data.jsonl").write_text('{"text": "hello"}\n')
    error = usage_error(capsys, folder, "--model", str(larger), "--data", "data.jsonl")
    assert "uses token 259, but the model has 259 embeddings" in error


def test_ctrl_c_leaves_no_files(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastlora.tools.finetune.train", interrupt)
    assert main(SMALL) == 130
    assert os.listdir(folder) == []
    assert "interrupted" in capsys.readouterr().err


def test_errors_of_fastlora_exit_with_code_1_and_one_line(
    folder: Path, own_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise fastlora.FastLoRAError("strict=True, and these stay as they are:\n  norm")

    monkeypatch.setattr(fastlora, "compile", fail)
    assert main([*SMALL, "--model", str(own_model), "--no-compare"]) == 1
    error = capsys.readouterr().err
    assert error == "error: fastlora stopped: strict=True, and these stay as they are: norm\n"
    assert os.listdir(folder) == []


def test_the_eager_model_is_freed_before_the_next_one_is_loaded(
    folder: Path, own_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref] = []

    def load(settings: Settings) -> PeftModel:
        assert all(model() is None for model in loaded)
        model = load_model(settings)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr("fastlora.tools.finetune.load_model", load)
    assert main([*SMALL, "--model", str(own_model), "--steps", "1"]) == 0
    assert len(loaded) == 2


def test_the_builtin_model_trains_on_plain_text(folder: Path) -> None:
    (folder / "text.jsonl").write_text('{"text": "abcdefgh"}\n')
    assert main([*SMALL, "--data", "text.jsonl", "--no-compare", "--steps", "3"]) == 0
    losses = json.loads((folder / "fastlora-run" / "summary.json").read_text())["fastlora"]["losses"]
    assert losses[2] < losses[0]


def test_a_different_loss_is_reported_but_no_error(
    folder: Path, own_model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastlora.tools.finetune.FLOAT32_BOUND", -1.0)
    assert main([*SMALL, "--model", str(own_model), "--steps", "2"]) == 0
    assert "fastlora changes the loss" in capsys.readouterr().out
    summary = json.loads((folder / "fastlora-run" / "summary.json").read_text())
    assert summary["comparison"]["within_bound"] is False


def test_help_is_shown_without_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "finetune" in capsys.readouterr().out


def test_quantized_weights_are_trained_and_fused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--load-in-4bit", "--strict"]) == 0
    summary = json.loads((folder / "fastlora-run" / "summary.json").read_text())
    assert summary["comparison"]["within_bound"]
    assert summary["coverage"]["lora"] == {"seen": 28, "fused": 28}
    assert summary["settings"]["load_in_4bit"] is True


def test_load_in_4bit_without_bitsandbytes_is_a_usage_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastlora.tools.quantization.find_spec", lambda _: None)
    assert "needs bitsandbytes" in usage_error(capsys, folder, "--load-in-4bit")
