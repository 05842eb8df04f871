"""Rules of this repository that a program can check: packaging, style, types, and the layers of imports."""

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "fastlora": "rewriter",
    "fastlora.kernels": "kernels",
    "fastlora.patterns": "patterns",
    "fastlora.tools": "tools",
    "fastlora.kernel_tests": "tests/kernels",
}
LAYERS = (
    "compat",
    "errors",
    "kernels.core",
    "kernels.formulas",
    "kernels.ops",
    "kernels.triton",
    "graph",
    "match",
    "pattern",
    "rule",
    "spelling",
    "rewrite",
    "patterns",
    "lower",
    "logits",
    "runtime",
    "reports",
    "frontend",
    "checking",
    "api",
    "",
    "tools",
)
"""Packages and modules of fastlora, lowest first: each imports itself and those before it. "" is `fastlora` itself."""
NARROW = {
    "errors": set(),
    "patterns": {"compat", "errors", "kernels.core", "kernels.formulas", "kernels.ops", "graph", "match"},
    "tools": {"", "compat", "errors", "kernels.core", "kernels.ops"},
}
"""Packages that may import only these, not all packages before them."""


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
    for package, folder in FOLDERS.items():
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


@cache
def modules() -> dict[str, Path]:
    """Return the package's modules by name, without `fastlora.`."""
    found = {}
    for package, folder in FOLDERS.items():
        if package != "fastlora.kernel_tests":
            for path in (ROOT / folder).rglob("*.py"):
                parts = [*package.split(".")[1:], *path.relative_to(ROOT / folder).with_suffix("").parts]
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> set[str]:
    """Return the modules that a module imports, including imports in functions and for type checking."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fastlora":
            source = node.module.removeprefix("fastlora").removeprefix(".")
            below = [f"{source}.{alias.name}".removeprefix(".") for alias in node.names]
            found |= {name if name in modules() else source for name in below}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.split(".")[0] == "fastlora"]
            found |= {name.removeprefix("fastlora").removeprefix(".") for name in names}
    return found - {module}


def layer(module: str) -> str:
    """Return the layer of a module."""
    if module in ("", "kernels"):
        return module
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "kernels" else 1])


def test_every_module_is_in_a_layer():
    assert {layer(module) for module in modules()} - {"kernels"} == set(LAYERS)


@pytest.mark.parametrize("name", LAYERS)
def test_imports_point_down(name):
    allowed = NARROW.get(name, set(LAYERS[: LAYERS.index(name)])) | {name}
    upward = {
        (module, imported)
        for module in modules()
        if layer(module) == name
        for imported in imports(module)
        if layer(imported) not in allowed | {"kernels"}
    }
    assert not upward


def test_no_import_is_circular():
    left = {module: imports(module) & modules().keys() for module in modules()}
    while ends := [
        m for m, needed in left.items() if not needed & left.keys() or not any(m in n for n in left.values())
    ]:
        for module in ends:
            left.pop(module)
    assert not left, f"these modules import each other: {sorted(left)}"


PRIVATE_BUT_USED = {
    "_version": "the version counter of tensors, which PyTorch's notes on autograd describe; read in every call",
    "_dora_cache": "of PEFT's DoRA layers; `peft_shims` tries out what it replaces before it does",
}
"""Private attributes of libraries that are read outside of `fastlora.compat`."""


def test_private_apis_are_used_only_in_compat():
    found = {
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources("rewriter", "patterns", "kernels")
        if path.parent.parent.name != "compat" and path.parent.name != "compat"
        for line, name in private_names(path)
    }
    assert not found, "\n".join(["reach these through fastlora.compat:", *sorted(found)])


def private_names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the private names that a module imports from libraries, or reads as attributes, with their lines.

    Names that fastlora defines itself, names of operators and members of named tuples are not included.
    """
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Attribute) and is_private(node.attr):
            said = ast.unparse(node)
            theirs = said.startswith("torch.") or node.attr not in own_private_names() | PRIVATE_BUT_USED.keys()
            if theirs and not said.startswith(("aten._", "sys._")):
                yield node.lineno, said
            continue
        else:
            continue
        for module, name in names:
            parts = [*module.split("."), name]
            private = "experimental" in parts or any(map(is_private, parts))
            if private and parts[0] in ("torch", "triton", "transformers", "peft", "bitsandbytes"):
                yield node.lineno, ".".join(filter(None, parts))


@cache
def own_private_names() -> frozenset[str]:
    """Return the private names that the code of fastlora defines, and those of named tuples."""
    names = {"_asdict", "_fields", "_replace"}
    for path in sources("rewriter", "patterns", "kernels"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                names.add(node.attr)
    return frozenset(names)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def test_every_package_is_packaged():
    """Packages are listed in pyproject.toml, since `fastlora` is composed of several folders."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    folders = {path.parent.relative_to(ROOT) for name in FOLDERS.values() for path in (ROOT / name).rglob("*.py")}
    assert {Path(folder) for folder in listed.values()} == folders


def test_the_package_does_not_import_model_libraries():
    for folder in ("rewriter", "patterns", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    assert not any(alias.name.split(".")[0] in ("transformers", "peft") for alias in node.names), path
                if isinstance(node, ast.ImportFrom) and node.module:
                    assert node.module.split(".")[0] not in ("transformers", "peft"), path


def test_the_code_names_no_architecture():
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    common_words = {
        "align",
        "data",
        "decision",
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
    names = {re.split(r"[_\-0-9]", name)[0] for name in CONFIG_MAPPING_NAMES} - common_words
    names = {name for name in names if len(name) >= 4}
    assert {"llama", "gemma", "bert"} <= names
    for folder in ("rewriter", "patterns", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            said = {part.lower() for word in _words(path) for part in re.findall(r"[A-Z]?[a-z]+", word)}
            assert not said & names, (path, said & names)


def _words(path):
    """Yield the identifiers and strings of a module, without its docstrings."""
    tree = ast.parse(path.read_text())
    alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg"):
            if isinstance(word := getattr(node, field, None), str):
                yield word
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in alone:
            yield node.value
