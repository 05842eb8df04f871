"""`fastlora zoo` builds tiny models, tells wrong gradients from rounding, and survives what models do to processes."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastlora.tools.cli import main
from fastlora.tools.problems import UsageError
from fastlora.tools.zoo import command, examine
from fastlora.tools.zoo.command import RESULTS, Visit, examined, run
from fastlora.tools.zoo.kinds import Kind
from fastlora.tools.zoo.shrink import HEAD_DIM, HEADS, HIDDEN, LAYERS, VOCABULARY, shrunk

GPT2 = Kind("gpt2")


def test_configurations_become_tiny_and_keep_layers_of_each_kind() -> None:
    config = shrunk("gemma3_text")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (HIDDEN, LAYERS, VOCABULARY)
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert shrunk("deepseek_v3").num_key_value_heads == HEADS
    assert shrunk("llama4").text_config.hidden_size == HIDDEN
    assert shrunk("llama4").vision_config.num_hidden_layers == LAYERS


def test_nested_configurations_keep_their_types_and_fit() -> None:
    config = shrunk("internvl")
    assert (config.text_config.model_type, config.vision_config.model_type) == ("qwen2", "internvl_vision")
    assert shrunk("qwen3_vl").vision_config.deepstack_visual_indexes == list(range(LAYERS))
    assert sum(shrunk("qwen2_vl").text_config.rope_parameters["mrope_section"]) == HEAD_DIM // 2
    assert shrunk("wav2vec2").conv_dim == [HIDDEN] * 7
    assert shrunk("gemma4").vision_config.hidden_size == HIDDEN  # there is none by default
    assert shrunk("mllama").text_config.cross_attention_layers == [1]  # one field of many
    assert shrunk("mllama").text_config.hidden_size == HIDDEN


def test_a_wrong_gradient_is_no_rounding() -> None:
    model = examine.build(GPT2)
    inputs = examine.batch(model, GPT2)
    truth, eager = copy.deepcopy(model), examine._step(model, inputs)
    for factor, verdict in ((1 + 1e-7, examine.EQUAL), (1.001, examine.DIFFERENT)):
        found, compiled = examine.Examined("gpt2"), copy.deepcopy(eager)
        next(reversed(compiled.gradients.values())).mul_(factor)
        examine._compare(found, compiled, eager, copy.deepcopy(truth), inputs)
        assert found.verdict == verdict
    found = examine.Examined("gpt2")
    examine._compare(found, examine._Step(eager.loss, {}), eager, truth, inputs)
    assert found.verdict == examine.DIFFERENT
    assert "missing" in str(found.problem)


def test_what_cannot_be_told_from_rounding_is_different(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the float64 step fails, and where a gradient is not a number."""
    model = examine.build(GPT2)
    inputs = examine.batch(model, GPT2)
    eager = examine._step(model, inputs)
    found, compiled = examine.Examined("gpt2"), copy.deepcopy(eager)
    next(iter(compiled.gradients.values())).fill_(float("nan"))
    examine._compare(found, compiled, eager, model, inputs)
    assert found.verdict == examine.DIFFERENT

    def compare(found: examine.Examined, compiled: examine._Step, eager: examine._Step, *_: object) -> None:
        compiled.gradients = {name: 2 * g for name, g in compiled.gradients.items()}
        compared(found, compiled, eager, torch.nn.Identity(), inputs)

    compared = examine._compare
    monkeypatch.setattr(examine, "_compare", compare)
    assert examine.examine(GPT2)["verdict"] == examine.DIFFERENT


def test_what_cannot_be_built_or_trained_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    found = examine.examine(Kind("no such type"))
    assert (found["verdict"], "no such type" in found["problem"]) == (examine.UNBUILT, True)
    monkeypatch.setattr(examine, "batch", lambda *_: {"input_ids": torch.zeros(1, 0, dtype=torch.int64)})
    assert examine.examine(GPT2)["verdict"] == examine.UNTRAINED


def test_a_process_that_takes_too_long_or_dies_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    (late,) = examined([GPT2], jobs=1, seconds=0.0)
    assert (late["verdict"], late["problem"]) == (examine.FAILED, "it took longer than the time limit")
    monkeypatch.setattr(command, "_work", os._exit)  # which no kind is a code for
    (dead,) = examined([GPT2], jobs=1, seconds=600.0)
    assert (dead["verdict"], "ended with code" in dead["problem"]) == (examine.FAILED, True)


def test_results_are_kept_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, golden = tmp_path / "page.md", tmp_path / "golden.json"
    arguments = ["zoo", "gpt2", "--output", str(tmp_path), "--page", str(page), "--golden", str(golden)]
    arguments += ["--seconds", "900"]
    assert main(arguments) == 0
    assert "gpt2: equal" in capsys.readouterr().out
    assert json.loads(golden.read_text())["gpt2"]["sites"]["lora"] == [8, 8]
    assert "| gpt2 | equal | 8/8 |" in page.read_text()
    (tmp_path / RESULTS).open("a").write('{"name": "cut o')
    assert main(arguments) == 0
    assert "gpt2: equal" not in capsys.readouterr().out
    assert len((tmp_path / RESULTS).read_text().splitlines()) == 1


def test_the_name_of_a_class_stands_for_its_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def equal(errands: list[command.Errand], *_: object) -> list[command.Row]:
        return [asdict(examine.Examined(str(kind), way, examine.EQUAL)) for kind, way in errands]

    monkeypatch.setattr(command, "examined", equal)
    page = tmp_path / "ways.md"
    assert run(Visit(tmp_path, ["gpt2", "AutoModelForCTC", "gpt2"], ["dropout", "full"], page=page), Console())
    rows = [json.loads(line) for line in (tmp_path / RESULTS).read_text().splitlines()]
    types = {row["name"] for row in rows}
    assert len(rows) == 2 * len(types)
    assert {"gpt2", "wav2vec2:AutoModelForCTC"} <= types
    assert "llama" not in types
    assert "fastlora zoo gpt2 AutoModelForCTC gpt2 --way" in page.read_text()


@pytest.mark.parametrize(("visit", "named"), [
    (Visit(Path("x"), ["lama"]), "lama"),
    (Visit(Path("x"), jobs=0), "--jobs 0"),
    (Visit(Path("x"), seconds=0), "--seconds 0"),
])  # fmt: skip
def test_wrong_arguments_are_named(visit: Visit, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        run(visit, Console())


def test_the_types_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert {"llama", "mamba", "bert:AutoModelForMaskedLM", "llava:AutoModelForImageTextToText"} <= set(names)
    assert [name for name in names if name.startswith("voxtral:")] == ["voxtral:AutoModelForSpeechSeq2Seq"]
