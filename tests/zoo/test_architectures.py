"""Tiny models of many architectures train compiled as they do eager, and as much is fused as was when last looked at.

`golden.json` has all types; `fastlora zoo --golden tests/zoo/golden.json` writes it anew, which takes some minutes, and
whose difference to the one before shows what a release of transformers has respelled. A sample of each class of models
runs here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fastlora.tools.zoo.examine import EQUAL, examine
from fastlora.tools.zoo.kinds import kinds
from fastlora.tools.zoo.page import golden

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())


def _sample() -> list[str]:
    classes: dict[str, list[str]] = {}
    for name in sorted(GOLDEN):
        classes.setdefault(name.partition(":")[2], []).append(name)
    return [name for names in classes.values() for name in names[::8]]


@pytest.mark.parametrize("name", _sample())
def test_an_architecture_trains_as_eager_and_fuses_as_recorded(name: str) -> None:
    found = examine(kinds()[name])
    assert found["verdict"] == EQUAL, found["problem"]
    assert golden(found) == GOLDEN[name], f"left: {found['missed']}"


def test_every_known_type_is_equal() -> None:
    assert len(GOLDEN) >= 350
    assert {row["verdict"] for row in GOLDEN.values()} == {EQUAL}


def test_nearly_all_types_are_fused_entirely() -> None:
    left = {name: sum(seen - fused for seen, fused in row["sites"].values()) for name, row in GOLDEN.items()}
    whole = [name for name, row in GOLDEN.items() if left[name] == row.get("uncovered", 0)]
    assert len(whole) >= 0.9 * len(GOLDEN)
    assert sum(not sites for sites in left.values()) >= 0.85 * len(GOLDEN)
