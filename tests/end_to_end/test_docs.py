"""The documentation is true: its links lead somewhere, its code runs, its lists are those of the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from test_house import LAYERS

from fastlora.rewrite.pipeline import PASSES

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("C*.md")), *sorted((ROOT / "docs").rglob("*.md")), ROOT / "tests" / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
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
        for name in re.findall(r"(?:`|<br/>)([\w/]+\.py|[\w/]+/)(?:`|\")", text):
            assert any((folder / name).exists() for folder in folders), f"{page.name}: {name}"
