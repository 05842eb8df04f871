"""The README's examples run, and its figure, commands and numbers match the pages that they come from."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path

import pytest
import torch
from tiny_models import batch, build

import fastlora

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
FIGURE = runpy.run_path(str(ROOT / "docs" / "results" / "speed_and_memory.py"))


def run(snippet: str, **scope: object) -> dict[str, object]:
    exec(compile(snippet, str(Path(__file__).with_name("readme_snippet.py")), "exec"), scope)
    return scope


def test_a_model_is_compiled_in_place(capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = [each for each in PYTHON if "fastlora.report" in each]
    model = build("llama")
    assert run(snippet, model=model, batch=batch())["model"] is model
    assert "lora_mlp" in capsys.readouterr().out


def test_the_backend_needs_no_import() -> None:
    (snippet,) = [each for each in PYTHON if "backend=" in each]
    assert "import fastlora" not in snippet
    compiled = run(snippet, model=torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.SiLU()))["compiled"]
    compiled(torch.randn(2, 4)).sum().backward()  # type: ignore[operator]


def test_every_snippet_is_python() -> None:
    for snippet in PYTHON:
        ast.parse(snippet)


def test_options_in_the_table_are_accepted() -> None:
    options = re.findall(r"^\| `(\w+=[^`]+)` \|", README, re.MULTILINE)
    assert len(options) == 5
    for option in options:
        fastlora.compile(torch.nn.Linear(2, 2), **eval(f"dict({option})"))


def test_the_readme_has_the_number_of_shipped_examples() -> None:
    (count,) = re.findall(r"on (\d+) instruction examples", README)
    data = ROOT / "tools" / "data" / "instructions.jsonl"
    assert int(count) == len(data.read_text().splitlines())


def test_the_readme_has_the_number_of_covered_model_types() -> None:
    equal, whole = re.findall(r"each of (\d+) types: .*?, (\d+) are fused entirely", README)[0]
    page = (ROOT / "docs" / "results" / "coverage.md").read_text()
    assert f"| of them equal when compiled | {equal} | {equal} |" in page
    assert f"| of them with every candidate fused | {equal} | {whole} |" in page


def test_the_readme_names_the_conditions_of_its_figure() -> None:
    date, gpu = FIGURE["conditions"]()
    assert f"one {gpu} (80 GB, 700 W), {date}" in README
    (command,) = re.findall(r"```bash\n(.*?)\n```", FIGURE["section"](), re.DOTALL)
    assert f"`{command}`" in README


def test_the_figure_is_drawn_from_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    FIGURE["draw"](tmp_path / "drawn.svg")
    shown, drawn = ((path).read_text() for path in (FIGURE["PICTURE"], tmp_path / "drawn.svg"))
    marks = r'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)"'
    texts = r">([^<>]+)</text>"
    assert re.findall(texts, shown) == re.findall(texts, drawn)
    assert re.findall(marks, shown) == re.findall(marks, drawn), "run python docs/results/speed_and_memory.py"
    assert all(row.name in shown for row in FIGURE["rows"]())


def test_the_command_of_the_tests_is_between_its_marks() -> None:
    (between,) = re.findall(r"<!-- tests -->\n```bash\n(.*?)\n```\n<!-- end -->", README, re.DOTALL)
    assert between.count("\n") == 0
    assert between.endswith(".venv/bin/pytest -n 2")
