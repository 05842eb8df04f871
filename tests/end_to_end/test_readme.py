"""What the README says can be done, done."""

import re
from pathlib import Path

import torch
from torch import nn

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_pattern_in_the_readme_works(monkeypatch):
    (snippet,) = [s for s in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "@fastlora.rule" in s]
    assert len(snippet.strip().splitlines()) <= 12

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up = nn.Linear(4, 8), nn.Linear(4, 8)

        def forward(self, x):
            gate = self.gate(x)
            return (gate * torch.sigmoid(gate)) * self.up(x)

    scope = {"model": Gated()}
    path = Path(__file__).with_name("readme_snippet.py")
    exec(compile(snippet, str(path), "exec"), scope)
    scope["model"](torch.randn(3, 4)).sum().backward()
    assert scope["fastlora"].report(scope["model"]).coverage["glu"].fused == 1


def test_the_readme_counts_the_examples_that_are_shipped():
    (count,) = re.findall(r"on (\d+) instruction examples", README)
    data = Path(__file__).parents[2] / "tools" / "data" / "instructions.jsonl"
    assert int(count) == len(data.read_text().splitlines())
