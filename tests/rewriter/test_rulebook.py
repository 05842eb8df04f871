"""`rules` and entry points of packages must be lists of rules, or an error says what they are."""

from __future__ import annotations

import re
import sys
from collections import UserDict
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest
import torch

import fastlora
from fastlora.match.rulebook import check_rules, rules_of
from fastlora.patterns import RULES, norms


@pytest.mark.parametrize("rules", [[], RULES, tuple(RULES), iter(RULES)], ids=["none", "list", "tuple", "iterator"])
def test_lists_of_rules_are_accepted(rules: Any) -> None:
    assert check_rules(rules) in ([], RULES)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ("all", "rules='all' is not a list of rules; leave rules out for fastlora.default_rules()"),
        (True, "rules=True is not a list of rules"),
        (norms.rms_norm, "is one rule: pass a list, rules=[rms_norm]"),
        (norms, "is a module: pass its list of rules, rules=fastlora.patterns.norms.RULES"),
        ([len], "rules[0] is <built-in function len>, which is not a rule: what @fastlora.rule, @fastlora.fuse or"),
        (
            [norms.rms_norm, RULES],
            "which is not a rule: unpack it with *, as in rules=[*fastlora.default_rules(),",
        ),
        ([[norms.rms_norm]], "rules[0] is [rms_norm ("),
        ([norms], "which is not a rule: unpack its list, as in rules=[*module.RULES]"),
        ([None], "rules[0] is None, which is not a rule; leave rules out for fastlora.default_rules()"),
        (
            {"input_ids": torch.ones(1, 4)},
            "rules is a dict: pass the batch as keyword arguments, explain(model, **batch)",
        ),
        (UserDict(input_ids=torch.ones(1, 4)), "rules is a UserDict: pass the batch as keyword arguments"),
        (torch.ones(1, 4), "rules is a Tensor: pass the batch as keyword arguments"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_anything_else_is_an_error_with_the_remedy(rules: Any, said: str) -> None:
    with pytest.raises(fastlora.FastLoRAError, match=re.escape(said)):
        check_rules(rules)


def _entry(value: str) -> EntryPoint:
    return EntryPoint("mine", value, "fastlora.patterns")


@pytest.mark.parametrize("value", ["fastlora.patterns.norms", "fastlora.patterns.norms:RULES"])
def test_an_entry_point_is_a_module_or_a_list(value: str) -> None:
    assert rules_of(_entry(value)) == norms.RULES


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("not_a_package.rules", "does not load: ModuleNotFoundError: No module named 'not_a_package'"),
        ("fastlora.patterns.norms:RULEZ", "does not load: AttributeError: module"),
        ("json", "is neither a list of rules nor a module with one as RULES"),
        ("fastlora.patterns.norms:rms_norm", "is neither a list of rules nor a module"),
        ("brings_nothing", "is neither a list of rules nor a module"),
        ("brings_a_function", "has <built-in function len> at 0, which is not a rule"),
    ],
)
def test_an_entry_point_without_rules_is_named(value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, rules in (("brings_nothing", []), ("brings_a_function", [len])):
        module = ModuleType(name)
        module.RULES = rules  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(fastlora.FastLoRAError, match=re.escape(said)) as error:
        rules_of(_entry(value))
    message = str(error.value)
    assert message.startswith(f"the entry point mine = {value} of the group fastlora.patterns ")
    assert message.endswith("fix or uninstall the package that provides it, or pass rules= to fastlora.compile")
