"""Dumped graphs are files that run, log lines name what was fused, and reports contain runnable programs."""

import logging
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import batch, build

import fastlora

RUN = """
import runpy, sys, torch
torch.set_num_threads(1)
results, *files = sys.argv[1:]
torch.save([runpy.run_path(file)["run"]() for file in files], results)
"""


def run_in_new_process(*files: Path) -> list[tuple[list[Any], list[Any]]]:
    """Return the outputs and gradients of dumped graphs."""
    results = files[0].with_suffix(".pt")
    environment = {name: value for name, value in os.environ.items() if name != "FASTLORA_DUMP"}
    subprocess.run([sys.executable, "-c", RUN, str(results), *map(str, files)], check=True, env=environment)
    return torch.load(results)


def run_file(path: Path) -> tuple[list[Any], list[Any]]:
    """Return the outputs and gradients of a dumped graph."""
    return runpy.run_path(str(path))["run"]()


def assert_equal(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected) > 0
    for mine, its in zip(found, expected, strict=True):
        assert (mine is None) == (its is None)
        if mine is not None:
            assert mine.dtype == its.dtype
            assert float((mine - its).norm()) <= 1e-5 * max(float(its.norm()), 1e-6)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dumped_graphs_run_and_are_equal(tmp_path, monkeypatch, checkpointing):
    monkeypatch.setenv("FASTLORA_DUMP", str(tmp_path / "dump"))
    model = build("llama")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    fastlora.compile(model.train())
    model(**batch()).loss.backward()
    folders = sorted((tmp_path / "dump").iterdir())
    assert len(folders) == fastlora.report(model).graphs
    layer = next(folder for folder in folders if folder.name.endswith("layers.0"))
    assert {file.name for file in layer.iterdir()} == {"before.py", "after.py", "changes.diff", "report.txt"}
    before, after = run_in_new_process(layer / "before.py", layer / "after.py")
    assert "lora_mlp.default(" in (layer / "after.py").read_text()
    assert "lora_mlp.default(" not in (layer / "before.py").read_text()
    assert_equal(after[0], before[0])
    assert_equal(after[1], before[1])
    assert "+++ after.py" in (layer / "changes.diff").read_text()
    lines = (layer / "report.txt").read_text().splitlines()
    assert any(line.startswith("fused lora_mlp at ") for line in lines)
    assert any(line.startswith("pass raise_ops: ") for line in lines)


def test_a_graph_with_deferred_logits_is_dumped(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_DUMP", str(tmp_path))
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 9))
    loss = torch.nn.CrossEntropyLoss()

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = model[0], model[1]

        def forward(self, x, labels):
            logits = self.head(self.layers(x))
            return loss(logits, labels), logits

    torch.compile(Whole(), backend="fastlora")(torch.randn(3, 4), torch.tensor([1, 2, 3]))[0].backward()
    (folder,) = tmp_path.iterdir()
    assert "DeferredHead" in (folder / "after.py").read_text()
    before, after = run_file(folder / "before.py"), run_file(folder / "after.py")
    assert_equal(after[0], before[0])
    assert_equal(after[1], before[1])


def test_nothing_is_dumped_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("FASTLORA_DUMP", raising=False)
    model = fastlora.compile(build("llama"))
    model(**batch()).loss.backward()
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_dump_folder_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTLORA_DUMP", str(tmp_path / "file"))
    with pytest.raises(fastlora.FastLoRAError, match=r"FASTLORA_DUMP=.*file: cannot be written"):
        fastlora.compile(build("llama"))(**batch())


def test_a_report_has_programs(tmp_path):
    model = fastlora.compile(build("llama"))
    report = fastlora.report(model)
    with pytest.raises(fastlora.FastLoRAError, match="run a training step first"):
        report.program()
    model(**batch()).loss.backward()
    report = fastlora.report(model)
    assert report.programs.keys() == report.code.keys()
    region = next(name for name in report.code if "layers" in name)
    (tmp_path / "graph.py").write_text(report.program(region))
    outputs, gradients = run_file(tmp_path / "graph.py")
    assert all(t.isfinite().all() for t in outputs)
    assert any(t is not None for t in gradients)
    with pytest.raises(fastlora.FastLoRAError, match="region must be the name of a compiled graph; got 'nowhere'"):
        report.program("nowhere")
    assert "programs" not in report.to_json()


PROGRAM = """
import torch
layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.SiLU())
torch.compile(layers, backend="fastlora")(torch.randn(2, 4)).sum().backward()
"""


@pytest.mark.parametrize("setting", ["fastlora", "+fastlora", None])
def test_torch_logs_selects_the_level(setting):
    """fastlora registers nothing with PyTorch's logging."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_LOGS"}
    environment |= {} if setting is None else {"TORCH_LOGS": setting}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, env=environment)
    assert ("compiled a graph in" in done.stderr) == bool(setting)
    assert ("raise_ops" in done.stderr) == (setting == "+fastlora")


def test_a_second_graph_is_logged_as_a_recompilation(caplog, monkeypatch):
    lines: list[str] = []

    class Keeps(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("fastlora"), Keeps()
    monkeypatch.setattr(logger, "level", logging.INFO)
    logger.addHandler(handler)
    logger.manager._clear_cache()
    try:
        model = fastlora.compile(build("llama"))
        for rows in (2, 3):
            inputs = {name: t[:1].repeat(rows, 1) for name, t in batch().items()}
            model(**inputs).loss.backward()
    finally:
        logger.removeHandler(handler)
    assert any(": compiled a graph in" in line for line in lines)
    assert any(": recompiled a graph in" in line for line in lines)
