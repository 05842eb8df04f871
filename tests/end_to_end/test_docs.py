"""The documentation is true: its links lead somewhere, its code runs, its lists are those of the code."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import io
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_contributing import MISH_GATE, NEW_SPELLING
from test_house import LAYERS

from fastlora.graph import spelling
from fastlora.kernels.core.semantic_op import Policy
from fastlora.rewrite.pipeline import PASSES

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "tests" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        found = page.parent / name if name else page
        assert found.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(found), f"{page.name} links to {target}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def column(title: str, page: str) -> list[str]:
    """The first column, without backticks, of the table on a page whose first title is this."""
    lines = iter((ROOT / page).read_text(encoding="utf-8").splitlines())
    next(line for line in lines if line.startswith(f"| {title} |"))
    next(lines)
    found = []
    for line in lines:
        if not line.startswith("|"):
            break
        found.append(line.split("|")[1].strip().strip("`"))
    return found


def test_the_architecture_page_lists_the_layers() -> None:
    assert column("layer", "docs/architecture.md") == [layer or "fastlora" for layer in LAYERS]


def test_the_architecture_page_lists_the_passes() -> None:
    assert column("pass", "docs/architecture.md") == [each.__name__ for each in PASSES]


def test_files_that_pages_name_are_there() -> None:
    """Paths such as `rewrite/pipeline.py`, from the root or from a folder of the package."""
    folders = [ROOT, ROOT / "rewriter", ROOT / "kernels" / "core"]
    for page in PAGES:
        if "results" in page.parts or page.name == "CHANGELOG.md" or page.parent.name == "tests":
            continue
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"(?:`|<br/>)([\w/]*/(?:\w+\.py)?)(?:`|\")", text):
            assert any((folder / name).exists() for folder in folders), f"{page.name}: {name}"


BLOCK = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:^```text\n(?P<output>.*?)^```\n)?", re.DOTALL | re.MULTILINE)


def run_page(page: Path) -> Iterator[tuple[str | None, str]]:
    """Run a page's blocks of Python in order, in one namespace; yield what each is said to print, and prints."""
    text = page.read_text(encoding="utf-8")
    scope: dict[str, Any] = {"__name__": page.stem.replace("-", "_")}
    for block in BLOCK.finditer(text):
        above = text[: block.start("code")].count("\n")
        code = compile("\n" * above + block["code"], str(page), "exec")  # errors name the page's line
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, scope)
        yield block["output"], printed.getvalue()


@pytest.mark.parametrize("name", ["writing-rules", "writing-ops"])
def test_pages_show_what_their_code_prints(name: str) -> None:
    if name == "writing-ops":
        pytest.importorskip("triton")
    page = ROOT / "docs" / f"{name}.md"
    with canonical_operations_restored():
        for shown, printed in run_page(page):
            assert without_line_numbers(shown or "") == without_line_numbers(printed.replace(str(page), page.name))


def without_line_numbers(text: str) -> str:
    """Line numbers of a page change with every edit above them."""
    return re.sub(r"\.md:\d+", ".md", text)


def test_the_page_on_ops_describes_every_field_of_a_policy() -> None:
    assert column("field", "docs/writing-ops.md") == [each.name for each in dataclasses.fields(Policy)]


@contextlib.contextmanager
def canonical_operations_restored() -> Iterator[None]:
    """Forget what a page spells, which is known in the whole process."""
    tables = [spelling._OPS, *spelling._SPELLINGS.values()]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, entries in zip(tables, before, strict=True):
            table.clear()
            table.update(entries)


@pytest.mark.parametrize("edits", [NEW_SPELLING, MISH_GATE], ids=["spelling", "activation"])
def test_the_walkthroughs_are_the_contributors_trial(edits: dict[str, list[tuple[str, str]]]) -> None:
    """Each line that `test_contributing.py` adds is in CONTRIBUTING.md, which names its file as well."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    shown = {line.strip().removeprefix("+").strip() for line in page.splitlines() if line.strip().startswith("+")}
    for file, pairs in edits.items():
        assert f"`{file}`" in page
        for before, after in pairs:
            added = set(after.splitlines()) - set(before.splitlines())
            told = "dsl" in page and "mish, raised" in after  # one name more in an import, which the page says in words
            assert told or {line.strip() for line in added if line.strip()} <= shown


def test_the_api_page_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))["page"]()
    assert made == (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), "run python docs/make_api.py"


def test_messages_on_the_page_on_troubleshooting_are_fastloras() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## Messages")[2]
    known = texts()
    for message in re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE):
        for fragment in message.split("…"):
            part = fragment.strip(" ,.;:()")
            assert any(part in text for text in known), f"{message}: nothing in the package says {part!r}"


def texts() -> set[str]:
    """The strings in the package, those of f-strings in pieces."""
    found = set()
    for folder in ("rewriter", "kernels", "patterns", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def test_the_source_distribution_holds_what_its_tests_read(tmp_path: Path) -> None:
    folders = ("rewriter", "kernels", "patterns", "tools", "tests", "docs")
    for folder in folders:
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (
        *ROOT.glob("*.md"),
        *ROOT.glob("*.txt"),
        *(ROOT / n for n in ("pyproject.toml", "MANIFEST.in", "LICENSE")),
    ):
        shutil.copy(file, tmp_path)
    expected = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    build = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as held:
        found = {name.partition("/")[2] for name in held.getnames()}
    assert not expected - found
