"""`FASTLORA_DUMP=FOLDER`: write each graph before and after rewriting as a Python file that runs, a diff, and a report.

Nothing is written unless the variable is set when a graph is compiled.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import fx

from fastlora.errors import FastLoRAError
from fastlora.reports.from_rewrite import misses, sites
from fastlora.reports.program import program_of
from fastlora.rewrite.state import Rewrite

VARIABLE = "FASTLORA_DUMP"


@dataclass(frozen=True)
class GraphDump:
    """The folder that a graph is written to, and the program of the graph before it was rewritten."""

    folder: Path
    region: str
    before: str

    @classmethod
    def from_environment(cls, region: str, gm: fx.GraphModule) -> GraphDump | None:
        """Return the dump of a traced graph, or None if `FASTLORA_DUMP` is not set."""
        folder = os.environ.get(VARIABLE)
        return cls(Path(folder), region, program_of(gm)) if folder else None

    def write(self, after: str, rewrites: Sequence[Rewrite]) -> None:
        """Write `before.py`, `after.py`, `changes.diff` and `report.txt` to a new folder in `folder`.

        Raises:
            FastLoRAError: if the files cannot be written.
        """
        lines = difflib.unified_diff(
            self.before.splitlines(keepends=True), after.splitlines(keepends=True), "before.py", "after.py"
        )
        files = {
            "before.py": self.before,
            "after.py": after,
            "changes.diff": "".join(lines),
            "report.txt": "".join(f"{line}\n" for line in self._report(rewrites)),
        }
        try:
            folder = self._new_folder()
            for name, text in files.items():
                (folder / name).write_text(text, encoding="utf-8")
        except OSError as problem:
            raise FastLoRAError(f"{VARIABLE}={self.folder}: cannot be written ({problem}); name another") from problem

    def _new_folder(self) -> Path:
        """Create a folder for one graph; other processes may be writing to the same dump."""
        name = re.sub(r"[^\w.-]", "_", self.region or "model")
        self.folder.mkdir(parents=True, exist_ok=True)
        for number in itertools.count(len(os.listdir(self.folder))):
            folder = self.folder / f"{number:03}-{name}"
            try:
                folder.mkdir()
            except FileExistsError:
                continue
            return folder
        raise AssertionError

    def _report(self, rewrites: Sequence[Rewrite]) -> list[str]:
        """Return a line for each fused op, for each candidate that is not fused, and for each pass."""
        lines = []
        for rewritten in rewrites:
            fused, missed = sites(rewritten, self.region, 1), misses(rewritten, self.region, 1)
            lines += [f"fused {site.op} at {site.where} by {site.rule}" for site in fused]
            lines += [f"not fused: {miss.op} at {miss.where}: {miss.reason}" for miss in missed]
            lines += [f"pass {each.name}: {each.seconds * 1e3:.2f} ms {each.counts}" for each in rewritten.records]
        return lines
