"""The rules of the house that a program can check: packaging, style, types, and what may import what."""

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
ROOMS = {
    "fastlora": "rewriter",
    "fastlora.kernels": "kernels",
    "fastlora.patterns": "patterns",
    "fastlora.tools": "tools",
    "fastlora.kernel_tests": "tests/kernels",
}
MAY_IMPORT = {
    "kernels": {"kernels"},
    "rewriter": {"kernels", "rewriter", "patterns"},
    "patterns": {"kernels", "rewriter", "patterns"},
    "tools": {"tools", "kernels"},  # kernels: what benchmarks measure
}


def run(*command: str, cwd: Path = ROOT) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_code_is_linted():
    run("ruff", "check", ".")


def test_code_is_formatted():
    run("ruff", "format", "--check", ".")


def test_the_package_type_checks(tmp_path):
    package = tmp_path / "fastlora"
    package.mkdir()
    for source in (ROOT / "rewriter").iterdir():
        (package / source.name).symlink_to(source)
    for name in ("kernels", "patterns", "tools"):
        (package / name).symlink_to(ROOT / name)
    run(
        "mypy",
        "--config-file",
        str(ROOT / "pyproject.toml"),
        "--cache-dir",
        str(tmp_path / "cache"),
        "-p",
        "fastlora",
        cwd=tmp_path,
    )


def test_the_wheel_holds_every_module_and_data_file(tmp_path):
    run("pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path))
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    for package, folder in ROOMS.items():
        for source in (ROOT / folder).rglob("*"):
            if source.suffix in (".py", ".jsonl", ".typed") and "__pycache__" not in source.parts:
                assert f"{package.replace('.', '/')}/{source.relative_to(ROOT / folder)}" in held


def test_every_dependency_that_is_tested_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["optional-dependencies"]
    named = [*project["dependencies"], *groups["train"], *groups["test"], *groups["dev"]]
    lines = [line for path in ROOT.glob("constraints*.txt") for line in path.read_text().splitlines()]
    pinned = {line.split("==")[0] for line in lines if "==" in line}
    for requirement in named:
        name = requirement.split(";")[0].split(">")[0].split("<")[0].strip()
        assert name in pinned, name


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_imports_point_one_way(room):
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastlora":
                parts = node.module.split(".")
                target = parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "rewriter"
                public = room == "tools" and parts == ["fastlora"]
                assert target in MAY_IMPORT[room] or public, f"{path.name} imports {node.module}"


def test_the_pass_knows_no_model_by_name():
    for room in ("rewriter", "patterns", "kernels"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    assert not any(alias.name.split(".")[0] in ("transformers", "peft") for alias in node.names), path
                if isinstance(node, ast.ImportFrom) and node.module:
                    assert node.module.split(".")[0] not in ("transformers", "peft"), path


def test_the_code_of_the_pass_says_no_architectures_name():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    everyday = {
        "align",
        "data",
        "depth",
        "embedding",
        "fast",
        "flex",
        "mask",
        "prompt",
        "seed",
        "step",
        "table",
        "time",
    }
    names = {re.split(r"[_\-0-9]", name)[0] for name in CONFIG_MAPPING_NAMES} - everyday
    names = {name for name in names if len(name) >= 4}
    assert {"llama", "gemma", "bert"} <= names
    for room in ("rewriter", "patterns", "kernels"):
        for path in (ROOT / room).rglob("*.py"):
            said = {part.lower() for word in _words(path) for part in re.findall(r"[A-Z]?[a-z]+", word)}
            assert not said & names, (path, said & names)


def _words(path):
    """The identifiers and strings of a module, without its docstrings."""
    tree = ast.parse(path.read_text())
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg"):
            if isinstance(word := getattr(node, field, None), str):
                yield word
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value
