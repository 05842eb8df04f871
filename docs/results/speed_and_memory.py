"""Draw `speed-and-memory.svg` from the first table of `training-step.md`: `python docs/results/speed_and_memory.py`.

The picture has no numbers of its own. Whoever measures again edits the page and runs this script.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
PAGE, PICTURE = HERE / "training-step.md", HERE / "speed-and-memory.svg"
SECTION = "## Llama-3.1-8B, 4 x 2,048 tokens"
MEASURED = re.compile(r"Measured on (\d{4}-\d\d-\d\d) on one (NVIDIA \w+)")
OWN = "#1f6feb"
OTHERS = "#6e7781"


class Row(NamedTuple):
    """A contender: milliseconds of a step, and GiB above weights and optimizer states."""

    name: str
    milliseconds: float
    memory: float


def section() -> str:
    """The part of the page that the picture is of."""
    return PAGE.read_text(encoding="utf-8").partition(SECTION)[2].partition("\n## ")[0]


def conditions() -> tuple[str, str]:
    """When and on what it was measured."""
    found = MEASURED.search(section())
    assert found is not None, f"{PAGE} does not say when and where {SECTION!r} was measured"
    return found[1], found[2]


def rows() -> list[Row]:
    """The rows of the section's first table."""
    lines = section().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| contender | ms |"))
    titles = cells(lines[start])
    found = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        row = dict(zip(titles, cells(line), strict=True))
        found.append(Row(row["contender"], float(row["ms"]), float(row["extra GiB"])))
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


LABELS = {  # where a label stands: its offset from the point in points, and its alignment
    "fastlora": (0, 10, "center"),
    "fastlora@9GiB": (0, -16, "center"),
    "Unsloth": (9, -4, "left"),
    "torch.compile, each layer": (0, 10, "center"),
    "Liger with torch.compile": (9, -4, "left"),
    "fastlora@0": (9, -4, "left"),
    "Unsloth, its checkpointing": (9, 2, "left"),
    "fastlora, with transformers' checkpointing": (9, -7, "left"),
    "eager": (-9, 4, "right"),
}


def draw(path: Path) -> None:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    date, gpu = conditions()
    settings = {"svg.hashsalt": "fastlora", "svg.fonttype": "none", "font.size": 10}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(8, 4.6), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for row in rows():
            own = row.name.startswith("fastlora")
            axes.plot(row.memory, row.milliseconds, "o", color=OWN if own else OTHERS, markersize=8 if own else 6)
            x, y, align = LABELS.get(row.name, (9, -4, "left"))
            axes.annotate(
                row.name, (row.memory, row.milliseconds), (x, y), textcoords="offset points", ha=align,
                color=OWN if own else OTHERS, fontsize=9,
            )  # fmt: skip
        axes.set(xlim=(0, 42), ylim=(450, 230))
        axes.set_xlabel("memory above weights and optimizer states (GiB), less is better")
        axes.set_ylabel("time of a training step (ms), less is better")
        axes.set_title(f"LoRA on 16 layers of Llama-3.1-8B, 4 x 2,048 tokens, bfloat16: one {gpu}, {date}", fontsize=10)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE)
