"""`fastlora zoo`: tiny configs, telling wrong gradients from rounding errors, processes, result files and pages."""

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
from fastlora.tools.errors import UsageError
from fastlora.tools.zoo import command, compare
from fastlora.tools.zoo.architectures import Architecture
from fastlora.tools.zoo.command import RESULTS, Options, run, run_tasks
from fastlora.tools.zoo.tiny_config import HEAD_DIM, HEADS, HIDDEN, LAYERS, VOCAB, tiny_config

GPT2 = Architecture("gpt2")


def test_configs_become_tiny_and_keep_a_layer_of_each_type() -> None:
    config = tiny_config("gemma3_text")
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (HIDDEN, LAYERS, VOCAB)
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert tiny_config("deepseek_v3").num_key_value_heads == HEADS
    assert tiny_config("llama4").text_config.hidden_size == HIDDEN
    assert tiny_config("llama4").vision_config.num_hidden_layers == LAYERS


def test_nested_configs_keep_their_types_and_have_consistent_sizes() -> None:
    config = tiny_config("internvl")
    assert (config.text_config.model_type, config.vision_config.model_type) == ("qwen2", "internvl_vision")
    assert tiny_config("qwen3_vl").vision_config.deepstack_visual_indexes == list(range(LAYERS))
    assert sum(tiny_config("qwen2_vl").text_config.rope_parameters["mrope_section"]) == HEAD_DIM // 2
    assert tiny_config("wav2vec2").conv_dim == [HIDDEN] * 7
    assert tiny_config("gemma4").vision_config.hidden_size == HIDDEN  # None by default
    assert tiny_config("mllama").text_config.cross_attention_layers == [1]  # an override, merged with other fields
    assert tiny_config("mllama").text_config.hidden_size == HIDDEN


def test_wrong_gradients_are_told_from_rounding_errors() -> None:
    model = compare.build(GPT2)
    inputs = compare.make_batch(model, GPT2)
    reference, eager = copy.deepcopy(model), compare._step(model, inputs)
    for factor, verdict in ((1 + 1e-7, compare.EQUAL), (1.001, compare.DIFFERENT)):
        result, compiled = compare.Result("gpt2"), copy.deepcopy(eager)
        next(reversed(compiled.gradients.values())).mul_(factor)
        compare._compare_float32(result, compiled, eager, copy.deepcopy(reference), inputs)
        assert result.verdict == verdict
    result = compare.Result("gpt2")
    compare._compare_float32(result, compare._Step(eager.loss, {}), eager, reference, inputs)
    assert result.verdict == compare.DIFFERENT
    assert "missing" in str(result.problem)


def test_gradients_that_cannot_be_verified_are_different(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are nan, or the float64 step fails."""
    model = compare.build(GPT2)
    inputs = compare.make_batch(model, GPT2)
    eager = compare._step(model, inputs)
    result, compiled = compare.Result("gpt2"), copy.deepcopy(eager)
    next(iter(compiled.gradients.values())).fill_(float("nan"))
    compare._compare_float32(result, compiled, eager, model, inputs)
    assert result.verdict == compare.DIFFERENT

    original = compare._compare_float32

    def doubled(result: compare.Result, compiled: compare._Step, eager: compare._Step, *_: object) -> None:
        compiled.gradients = {name: 2 * g for name, g in compiled.gradients.items()}
        original(result, compiled, eager, torch.nn.Identity(), inputs)

    monkeypatch.setattr(compare, "_compare_float32", doubled)
    assert compare.compare(GPT2)["verdict"] == compare.DIFFERENT


def test_types_that_cannot_be_built_or_trained_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    result = compare.compare(Architecture("no such type"))
    assert (result["verdict"], "no such type" in result["problem"]) == (compare.UNBUILT, True)
    monkeypatch.setattr(compare, "make_batch", lambda *_: {"input_ids": torch.zeros(1, 0, dtype=torch.int64)})
    assert compare.compare(GPT2)["verdict"] == compare.UNTRAINED


def test_processes_that_time_out_or_die_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    (late,) = run_tasks([(GPT2, "plain")], jobs=1, seconds=0.0)
    assert (late["verdict"], late["problem"]) == (compare.FAILED, "it took longer than the time limit")
    monkeypatch.setattr(command, "_work", os._exit)  # raises in the process: an architecture is no exit code
    (dead,) = run_tasks([(GPT2, "plain")], jobs=1, seconds=600.0)
    assert (dead["verdict"], "ended with code" in dead["problem"]) == (compare.FAILED, True)


def test_a_second_run_keeps_the_results_of_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_the_name_of_an_auto_class_selects_all_of_its_types(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def equal(tasks: list[command.Task], *_: object) -> list[command.Row]:
        return [asdict(compare.Result(str(architecture), way, compare.EQUAL)) for architecture, way in tasks]

    monkeypatch.setattr(command, "run_tasks", equal)
    page = tmp_path / "ways.md"
    assert run(Options(tmp_path, ["gpt2", "AutoModelForCTC", "gpt2"], ["dropout", "full"], page=page), Console())
    rows = [json.loads(line) for line in (tmp_path / RESULTS).read_text().splitlines()]
    types = {row["name"] for row in rows}
    assert len(rows) == 2 * len(types)
    assert {"gpt2", "wav2vec2:AutoModelForCTC"} <= types
    assert "llama" not in types
    assert "fastlora zoo gpt2 AutoModelForCTC gpt2 --way" in page.read_text()


@pytest.mark.parametrize(("options", "named"), [
    (Options(Path("x"), ["lama"]), "lama"),
    (Options(Path("x"), jobs=0), "--jobs 0"),
    (Options(Path("x"), seconds=0), "--seconds 0"),
])  # fmt: skip
def test_errors_name_the_wrong_argument(options: Options, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        run(options, Console())


def test_list_prints_all_types(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "--list"]) == 0
    names = capsys.readouterr().out.split()
    assert {"llama", "mamba", "bert:AutoModelForMaskedLM", "llava:AutoModelForImageTextToText"} <= set(names)
    assert [name for name in names if name.startswith("voxtral:")] == ["voxtral:AutoModelForSpeechSeq2Seq"]
