"""Which regions a model is divided into, which rules apply by default, and how graph breaks and progress are shown."""

from importlib.metadata import EntryPoint

import pytest
import torch
from tiny_models import FAMILIES, build
from torch import nn

import fastlora
from fastlora.frontend.progress import progress
from fastlora.frontend.regions import find_regions


def test_packages_add_rules_by_entry_point(monkeypatch):
    """An entry point is a list of rules, or a module with a list named RULES."""
    entries = [
        EntryPoint("a", "fastlora.patterns.norms", "fastlora.patterns"),
        EntryPoint("b", "fastlora.patterns.rotary:RULES", "fastlora.patterns"),
    ]
    builtin = fastlora.default_rules()
    monkeypatch.setattr(
        "fastlora.frontend.options.entry_points", lambda group: entries if group == "fastlora.patterns" else []
    )
    from fastlora.patterns import norms, rotary

    assert fastlora.default_rules() == [*builtin, *norms.RULES, *rotary.RULES]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_is_a_region_and_the_head_is_in_none(family):
    model = build(family)
    head = model.get_output_embeddings()
    regions = find_regions(model, head)
    blocks = [region for region in regions if region.name.rsplit(".", 1)[-1].isdigit()]
    assert len(blocks) == model.config.num_hidden_layers
    assert all(head not in set(region.module.modules()) for region in regions)
    inside = [module for region in regions for module in region.module.modules()]
    assert len(inside) == len(set(inside))


def test_single_layers_in_a_sequence_are_not_blocks():
    assert [region.name for region in find_regions(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))] == [""]


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sizes = (x > 0).sum(0).tolist()
        return self.layer(x) * sizes[0]


def test_graph_breaks_are_reported_with_their_reason() -> None:
    model = fastlora.compile(nn.ModuleList([Routed(), Routed()]), defer_logits=False)
    model[0](torch.randn(3, 4)).sum().backward()
    (reason,) = fastlora.report(model).breaks
    assert "dependent on the data of Tensor inputs" in reason
    assert "\n" not in reason


def test_the_progress_line_appears_on_terminals_and_is_erased(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress("compiling layers.0"):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress("compiling layers.0"):
        assert "fastlora: compiling layers.0" in capsys.readouterr().err
    assert capsys.readouterr().err == "\r\033[2K"
