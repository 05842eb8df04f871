"""Checking lists of rules that callers pass or packages provide."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import torch

from fastlora.errors import FastLoRAError
from fastlora.match.rule import AnyRule, GroupRule, Rule

_DEFAULT = "leave rules out for fastlora.default_rules()"


def check_rules(rules: Any) -> list[AnyRule]:
    """Return the `rules` of `fastlora.compile` and `fastlora.explain` as a list.

    Raises:
        FastLoRAError: if it is not a list of rules; the message says what to pass instead.
    """
    if isinstance(rules, (torch.Tensor, Mapping)):
        kind = type(rules).__name__
        raise FastLoRAError(f"rules is a {kind}: pass the batch as keyword arguments, explain(model, **batch)")
    shown = reprlib.repr(rules)
    if isinstance(rules, (Rule, GroupRule)):
        raise FastLoRAError(f"rules={shown} is one rule: pass a list, rules=[{rules.name}]")
    if isinstance(rules, ModuleType):
        raise FastLoRAError(f"rules={shown} is a module: pass its list of rules, rules={rules.__name__}.RULES")
    if isinstance(rules, (str, bytes)) or not isinstance(rules, Iterable):
        raise FastLoRAError(f"rules={shown} is not a list of rules; {_DEFAULT}")
    found = list(rules)
    for position, each in enumerate(found):
        if (reason := _why_no_rule(each)) is not None:
            raise FastLoRAError(f"rules[{position}] is {reprlib.repr(each)}, {reason}")
    return found


def rules_of(entry: EntryPoint) -> list[AnyRule]:
    """Return the rules of an entry point of the group `fastlora.patterns`: a list, or a module with one as `RULES`.

    Raises:
        FastLoRAError: if it cannot be loaded, or has no rules; the message names the entry point.
    """
    named = f"the entry point {entry.name} = {entry.value} of the group {entry.group}"
    remedy = "fix or uninstall the package that provides it, or pass rules= to fastlora.compile"
    try:
        loaded = entry.load()
    except Exception as problem:
        raise FastLoRAError(f"{named} does not load: {type(problem).__name__}: {problem}; {remedy}") from problem
    rules = loaded if isinstance(loaded, (list, tuple)) else getattr(loaded, "RULES", None)
    if not isinstance(rules, (list, tuple)) or not rules:
        raise FastLoRAError(f"{named} is neither a list of rules nor a module with one as RULES; {remedy}")
    for position, each in enumerate(rules):
        if (reason := _why_no_rule(each)) is not None:
            raise FastLoRAError(f"{named} has {reprlib.repr(each)} at {position}, {reason}; {remedy}")
    return list(rules)


def _why_no_rule(value: Any) -> str | None:
    """Return why a value is not a rule, or None if it is one."""
    if isinstance(value, (Rule, GroupRule)):
        return None
    if isinstance(value, (list, tuple)):
        return "which is not a rule: unpack it with *, as in rules=[*fastlora.default_rules(), mine]"
    if isinstance(value, ModuleType):
        return "which is not a rule: unpack its list, as in rules=[*module.RULES]"
    if callable(value):
        return "which is not a rule: what @fastlora.rule, @fastlora.fuse or @fastlora.group returns is one"
    return f"which is not a rule; {_DEFAULT}"
