"""Importing fastlora imports no other library, and all public names are available."""

import ast
import pickle
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastlora

SOURCE = Path(__file__).parents[2] / "rewriter" / "__init__.py"
HEAVY = ("torch", "triton", "sympy", "numpy", "transformers", "peft")


def loaded_after(*command: str) -> set[str]:
    """Return the packages in `sys.modules` of a new process after a statement."""
    report = "import atexit, sys; atexit.register(lambda: print('loaded', *sys.modules, file=sys.stderr))"
    done = subprocess.run(
        [sys.executable, "-c", f"{report}\n{command[0]}", *command[1:]], capture_output=True, text=True, check=True
    )
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("loaded ")]
    return {name.split(".")[0] for name in line.split()[1:]}


def test_import_loads_no_library():
    loaded = loaded_after("import fastlora; fastlora.__version__; dir(fastlora)")
    assert "fastlora" in loaded
    assert not loaded & {*HEAVY, "typer", "rich"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["finetune", "--help"], ["bench", "step", "--help"]])
def test_help_and_version_load_no_library(arguments):
    loaded = loaded_after("import sys; from fastlora.tools.cli import main; sys.exit(main(sys.argv[1:]))", *arguments)
    assert "typer" in loaded
    assert not loaded & set(HEAVY)


def test_importing_an_error_class_loads_no_library():
    assert not loaded_after("from fastlora import FastLoRAError, StrictError") & set(HEAVY)


def test_each_public_name_is_listed_for_type_checkers_and_at_run_time():
    tree = ast.parse(SOURCE.read_text())
    (typed,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imported = {
        alias.name: str(node.module).removeprefix("fastlora.")
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imported == fastlora._DEFINED_IN
    assert sorted(imported) == sorted(fastlora.__all__)


@pytest.mark.parametrize("name", fastlora.__all__)
def test_public_names_are_the_objects_of_their_modules(name):
    value = getattr(fastlora, name)
    assert value is getattr(sys.modules[f"fastlora.{fastlora._DEFINED_IN[name]}"], name)
    assert value is pickle.loads(pickle.dumps(value))
    assert name in dir(fastlora)


@pytest.mark.parametrize("first", ["", "fastlora.rule\n"], ids=["the module first", "the function first"])
def test_no_submodule_replaces_a_public_name(first):
    """Python sets a submodule as an attribute of its package, but `fastlora.rule` is the function that users call."""
    modules = [module.name for module in pkgutil.iter_modules(fastlora.__path__)]
    assert set(modules) & set(fastlora.__all__) == {"rule"}
    imports = "\n".join(f"import fastlora.{module}" for module in modules)
    check = "assert not any(type(getattr(fastlora, n)).__name__ == 'module' for n in fastlora.__all__)"
    subprocess.run([sys.executable, "-c", f"import fastlora\n{first}{imports}\n{check}"], check=True)


def test_a_misspelled_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'fastlora' has no attribute 'compiel'"):
        fastlora.compiel  # noqa: B018


def test_the_version_is_that_of_the_distribution(capsys):
    from importlib.metadata import version

    from fastlora.tools.cli import main

    assert fastlora.__version__ == version("fastlora-fx")
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastlora {fastlora.__version__}\n"
