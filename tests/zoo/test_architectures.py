"""Tiny models of many architectures: compiled gradients equal eager's, and the fused sites are those in `golden.json`.

`golden.json` has all types; the tests run a sample of each auto class. To regenerate it, run
`fastlora zoo --golden tests/zoo/golden.json`, which takes about twenty minutes. Its diff shows which models a release
of transformers has changed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastlora.tools.zoo.architectures import architectures
from fastlora.tools.zoo.compare import EQUAL, compare
from fastlora.tools.zoo.page import golden

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


def _sample() -> list[str]:
    classes: dict[str, list[str]] = {}
    for name in sorted(GOLDEN):
        classes.setdefault(name.partition(":")[2], []).append(name)
    return [name for names in classes.values() for name in names[::8]]


@pytest.mark.parametrize("name", _sample())
def test_gradients_equal_eagers_and_the_fused_sites_are_as_recorded(name: str) -> None:
    result = compare(architectures()[name])
    assert result["verdict"] == EQUAL, result["problem"]
    assert golden(result) == GOLDEN[name], f"not fused: {result['missed']}"


def test_every_recorded_type_is_equal() -> None:
    assert len(GOLDEN) >= 350
    assert {row["verdict"] for row in GOLDEN.values()} == {EQUAL}


def test_most_recorded_types_are_fused_entirely() -> None:
    unfused = {name: sum(seen - fused for seen, fused in row["sites"].values()) for name, row in GOLDEN.items()}
    complete = [name for name, row in GOLDEN.items() if unfused[name] == row.get("uncovered", 0)]
    assert len(complete) >= 0.9 * len(GOLDEN)
    assert sum(not sites for sites in unfused.values()) >= 0.85 * len(GOLDEN)
