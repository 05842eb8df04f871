"""Mutations of valid rules outside of the pattern: in the decorator, in its `attrs` and in the function's parameters.

Each yields mutated rules, with a part of the expected message.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from valid_rules import RuleSource

from fastlora.graph.canonical_ops import operations
from fastlora.kernels import ops
from fastlora.match.combinators import Raised
from fastlora.match.dsl import Param, Scalar, silu
from fastlora.match.pattern import Named, Op
from fastlora.match.rule import dtype_of, group, rule, tag_of

Mutation = Callable[[RuleSource, random.Random], Iterator[tuple[RuleSource, str]]]
MUTATIONS: dict[str, Mutation] = {}


def mutation(make: Mutation) -> Mutation:
    MUTATIONS[make.__name__.strip("_")] = make
    return make


def typo(name: str, rng: random.Random) -> str:
    """Return the name with an inserted, replaced or doubled letter."""
    at = rng.randrange(len(name))
    return rng.choice([name[:at] + "j" + name[at:], name[:at] + "j" + name[at + 1 :], name[:at] + name[at] + name[at:]])


def at_each(written: RuleSource, kind: type) -> Iterator[tuple[int, Any]]:
    """Yield the parts of a kind in a rule's pattern with their positions; a group has none."""
    yield from ((position, part) for position, part in enumerate(written.tree()) if isinstance(part, kind))


def _attributes(written: RuleSource, type_: str) -> list[str]:
    """Return the attributes of a rule that are of a type."""
    types = {a.name: a.type.removesuffix("?") for a in written.given[0].arguments}
    return [name for name in written.options.get("attrs", {}) if types[name] == type_]


def set_to(name: str, value: Any) -> Callable[[Any], None]:
    return lambda part: setattr(part, name, value)


def renamed(old: str, new: str, of: str) -> Callable[[Any], None]:
    """Return a change that renames an entry of a part's dictionary."""

    def change(part: Any) -> None:
        entries = getattr(part, of)
        setattr(part, of, {new if name == old else name: value for name, value in entries.items()})

    return change


@mutation
def _unknown_anchor(written, rng):
    if isinstance(written.options.get("anchor"), str):
        wrong = typo(written.options["anchor"], rng)
        yield written.with_option("anchor", wrong), f"anchor={wrong!r}"


@mutation
def _anchor_that_is_not_in_the_pattern(written, rng):
    if isinstance(written.options.get("anchor"), str):
        named = {part.op for _, part in at_each(written, Op)} | {"cast"}
        wrong = rng.choice(sorted(operations() - named))
        yield written.with_option("anchor", wrong), f"anchor={wrong!r} does not occur in the pattern"


@mutation
def _invalid_anchor(written, rng):
    if written.decorator is rule:
        for wrong, said in (
            (3, "anchor=3 is neither"),
            (str, "is neither the name"),
            (lambda node: True, "does not take a view and a node"),
            (["silu"], "anchor=['silu'] is neither"),
        ):
            yield written.with_option("anchor", wrong), said


@mutation
def _unknown_attribute(written, rng):
    for name in written.options.get("attrs", {}):
        wrong = typo(name, rng)
        yield written.with_attribute(wrong, 1.0), f"attrs {wrong!r} is not an argument of {written.given[0].name}"


@mutation
def _attribute_of_the_wrong_type(written, rng):
    wrongs = {
        "float": ["mean", True, torch.float32, None],
        "int": [1.5, "8", None],
        "str": [1, torch.float32, None],
        "ScalarType": ["float32", 32, None],
    }
    for type_, values in wrongs.items():
        for name in _attributes(written, type_):
            wrong = rng.choice(values)
            yield written.with_attribute(name, wrong), f"attrs {name}={wrong!r}"


@mutation
def _attribute_that_is_not_a_valid_choice(written, rng):
    for name in _attributes(written, "str"):
        wrong = typo(rng.choice(written.given[0].choices[name]), rng)
        yield written.with_attribute(name, wrong), f"attrs {name}={wrong!r} is not a valid {name}"


@mutation
def _alternative_that_is_not_a_valid_choice(written, rng):
    for at, part in at_each(written, Named):
        if part.name in ("act", "layout"):
            tag = rng.choice(list(part.inner.alternatives))
            wrong = typo(tag, rng)
            renames = renamed(tag, wrong, "alternatives")
            yield written.with_part(at, lambda p, r=renames: r(p.inner)), f"the alternative {wrong} of"


@mutation
def _dtype_of_an_unbound_name(written, rng):
    for name in _attributes(written, "ScalarType"):
        wrong = typo("power", rng)
        yield written.with_attribute(name, dtype_of(wrong)), f"nothing is captured or named {wrong!r}"


@mutation
def _tag_of_an_unbound_name(written, rng):
    for name in _attributes(written, "str"):
        yield written.with_attribute(name, tag_of("layuot")), "no either is named 'layuot'"
        yield written.with_attribute(name, lambda match: match.tag("actt")), "no either is named 'actt'"


@mutation
def _value_of_an_unbound_name(written, rng):
    for name in written.options.get("attrs", {}):
        yield written.with_attribute(name, lambda match: match.value("wieght")), "nothing is captured or named 'wieght'"


@mutation
def _attribute_function_with_a_wrong_signature(written, rng):
    for name in written.options.get("attrs", {}):
        yield written.with_attribute(name, dtype_of), f"attrs {name!r}: call dtype_of"
        for wrong in (lambda: 1.0, float):
            yield written.with_attribute(name, wrong), f"attrs {name!r}: {wrong!r} is neither"


@mutation
def _attribute_that_is_also_captured(written, rng):
    if written.decorator is not group:
        name = rng.choice([p.name for p in written.parameters() if not p.name.startswith("_")])
        yield written.with_attribute(name, 1.0), f"{name!r} is both captured and in attrs"


@mutation
def _attribute_that_is_also_raised(written, rng):
    for _, part in at_each(written, Raised):
        if name := next((n for n in part.captures() if n in written.given[0].names), None):
            yield written.with_attribute(name, None), f"{name!r} is both in attrs and captured from what was raised"


@mutation
def _missing_attribute(written, rng):
    for name in written.options.get("attrs", {}):
        rest = {n: value for n, value in written.options["attrs"].items() if n != name}
        if written.decorator is rule:
            yield written.with_option("attrs", rest), f"nothing provides [{name!r}]"


@mutation
def _attributes_that_are_not_a_dict(written, rng):
    if written.decorator is not group:
        yield written.with_option("attrs", [("out_dtype", dtype_of())]), "is not a dict"


@mutation
def _decorator_without_parentheses(written, rng):
    bare = replace(written, decorator=lambda: written.decorator, given=(), options={})
    yield bare, f"write @{written.decorator.__name__}(ops."


@mutation
def _invalid_op(written, rng):
    for wrong in (written.given[0].name, written.given[0].target, 7, ops):
        yield replace(written, given=(wrong,)), f"@{written.decorator.__name__} takes an op of fastlora.kernels.ops"


@mutation
def _benefit_that_is_not_an_integer(written, rng):
    for wrong in ("2", 1.5, None, True):
        yield written.with_option("benefit", wrong), f"benefit={wrong!r} is not an integer"


@mutation
def _function_that_raises(written, rng):
    if written.decorator is not group:
        for change in (lambda p: p @ p, lambda p: 1 if p else 2, lambda p: p.anything, lambda p: [*p]):
            raises = lambda p, c=change: c(p[0] if isinstance(p, tuple) else p)  # noqa: E731
            yield written.returning(raises), "its function raises "


@mutation
def _function_that_does_not_return_a_pattern(written, rng):
    if written.decorator is not group:
        for wrong in (None, 1.0, "silu", [], silu):
            yield written.returning(lambda _, w=wrong: w), f"returns {wrong!r}"


@mutation
def _too_many_outputs(written, rng):
    if written.decorator is not group:
        more = written.returning(lambda p: (*p, p[1]) if isinstance(p, tuple) else (p, p))
        yield more, f"values, but {written.given[0].name} has"


@mutation
def _parameter_that_is_not_an_argument(written, rng):
    if written.decorator is not group:
        parameters = [p for p in written.parameters() if not p.name.startswith("_")]
        old = rng.choice(parameters)
        wrong = typo(old.name, rng)
        renamed = [p.replace(name=wrong) if p.name == old.name else p for p in written.parameters()]

        def call(captures):
            return written.function(**{old.name if n == wrong else n: v for n, v in captures.items()})

        yield written.taking(renamed, call), f"{wrong!r} is not an argument of"


@mutation
def _unused_parameter(written, rng):
    if written.decorator is not group:
        more = [*written.parameters(), inspect.Parameter("_more", inspect.Parameter.KEYWORD_ONLY)]
        used = written.taking(more, lambda c: written.function(**{n: v for n, v in c.items() if n != "_more"}))
        yield used, "the parameters ['_more'] do not appear"


@mutation
def _invalid_annotation(written, rng):
    if written.decorator is not group:
        chosen = rng.choice([p.name for p in written.parameters()])
        for wrong in (torch.Tensor, float, Param, 2, lambda value: True):
            changed = [p.replace(annotation=wrong) if p.name == chosen else p for p in written.parameters()]
            yield written.taking(changed, lambda c: written.function(**c)), f"of {chosen!r} "


@mutation
def _default_of_the_wrong_type(written, rng):
    if written.decorator is not group:
        for chosen in written.parameters():
            if chosen.annotation is Scalar and not chosen.name.startswith("_"):
                changed = [
                    p.replace(default="1.0", kind=p.KEYWORD_ONLY) if p.name == chosen.name else p
                    for p in sorted(written.parameters(), key=lambda p: p.name == chosen.name)
                ]
                yield written.taking(changed, lambda c: written.function(**c)), f"the default {chosen.name}='1.0'"


@mutation
def _group_by_an_argument_that_cannot_be_shared(written, rng):
    if written.decorator is group:
        for wrong in (typo(written.options["by"], rng), 3, "lora_a" if written.given[0] is ops.lora_linear else "x"):
            yield written.with_option("by", wrong), repr(wrong)


@mutation
def _group_into_an_unsuitable_op(written, rng):
    if written.decorator is group:
        wrong = rng.choice([ops.glu, ops.lora_mlp, ops.linear_cross_entropy])
        yield written.with_option("into", wrong), f"{wrong.name} takes "
        yield written.with_option("into", "lora_group"), "@group takes an op of fastlora.kernels.ops as into"


@mutation
def _group_condition_with_a_wrong_signature(written, rng):
    if written.decorator is group:
        yield replace(written, function=lambda first, second: True), "is not a function of the list of matches"
