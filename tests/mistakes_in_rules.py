"""Mistakes that authors make around a pattern: in what a decorator, its `attrs` and the function's parameters say.

Each yields changed rules, with a part of the message that they have to get.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from written_rules import Written

from fastlora.graph.canonical_ops import operations
from fastlora.kernels import ops
from fastlora.match.combinators import Raised
from fastlora.match.dsl import Param, Scalar, silu
from fastlora.match.pattern import Named, Op
from fastlora.match.rule import dtype_of, group, rule, tag_of

Mistake = Callable[[Written, random.Random], Iterator[tuple[Written, str]]]
MISTAKES: dict[str, Mistake] = {}


def mistake(make: Mistake) -> Mistake:
    MISTAKES[make.__name__.strip("_")] = make
    return make


def typo(name: str, rng: random.Random) -> str:
    """The name with a letter too many, or another one."""
    at = rng.randrange(len(name))
    return rng.choice([name[:at] + "j" + name[at:], name[:at] + "j" + name[at + 1 :], name[:at] + name[at] + name[at:]])


def at_each(written: Written, kind: type) -> Iterator[tuple[int, Any]]:
    """The parts of a kind in a rule's pattern, and where they are; a group has none."""
    yield from ((position, part) for position, part in enumerate(written.tree()) if isinstance(part, kind))


def _attributes(written: Written, type_: str) -> list[str]:
    """The attributes of a rule that are of a type."""
    types = {a.name: a.type.removesuffix("?") for a in written.given[0].arguments}
    return [name for name in written.options.get("attrs", {}) if types[name] == type_]


def set_to(name: str, value: Any) -> Callable[[Any], None]:
    return lambda part: setattr(part, name, value)


def renamed(old: str, new: str, of: str) -> Callable[[Any], None]:
    """Gives an entry of a part's dictionary another name."""

    def change(part: Any) -> None:
        entries = getattr(part, of)
        setattr(part, of, {new if name == old else name: value for name, value in entries.items()})

    return change


@mistake
def _an_anchor_that_there_is_not(written, rng):
    if isinstance(written.options.get("anchor"), str):
        wrong = typo(written.options["anchor"], rng)
        yield written.given_in("anchor", wrong), f"anchor={wrong!r}"


@mistake
def _an_anchor_that_the_pattern_has_not(written, rng):
    if isinstance(written.options.get("anchor"), str):
        named = {part.op for _, part in at_each(written, Op)} | {"cast"}
        wrong = rng.choice(sorted(operations() - named))
        yield written.given_in("anchor", wrong), f"anchor={wrong!r} is in no match"


@mistake
def _an_anchor_that_cannot_be_asked(written, rng):
    if written.decorator is rule:
        for wrong, said in (
            (3, "anchor=3 is neither"),
            (str, "is neither the name"),
            (lambda node: True, "does not take a view and a node"),
            (["silu"], "anchor=['silu'] is neither"),
        ):
            yield written.given_in("anchor", wrong), said


@mistake
def _an_attribute_that_there_is_not(written, rng):
    for name in written.options.get("attrs", {}):
        wrong = typo(name, rng)
        yield written.with_attribute(wrong, 1.0), f"attrs {wrong!r} is not an argument of {written.given[0].name}"


@mistake
def _an_attribute_of_the_wrong_type(written, rng):
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


@mistake
def _an_attribute_that_is_no_choice(written, rng):
    for name in _attributes(written, "str"):
        wrong = typo(rng.choice(written.given[0].choices[name]), rng)
        yield written.with_attribute(name, wrong), f"attrs {name}={wrong!r} is not a valid {name}"


@mistake
def _an_alternative_that_is_no_choice(written, rng):
    for at, part in at_each(written, Named):
        if part.name in ("act", "layout"):
            tag = rng.choice(list(part.inner.alternatives))
            wrong = typo(tag, rng)
            renames = renamed(tag, wrong, "alternatives")
            yield written.with_part(at, lambda p, r=renames: r(p.inner)), f"the alternative {wrong} of"


@mistake
def _the_dtype_of_what_is_not_bound(written, rng):
    for name in _attributes(written, "ScalarType"):
        wrong = typo("power", rng)
        yield written.with_attribute(name, dtype_of(wrong)), f"nothing is captured or named {wrong!r}"


@mistake
def _the_tag_of_what_is_not_bound(written, rng):
    for name in _attributes(written, "str"):
        yield written.with_attribute(name, tag_of("layuot")), "no either is named 'layuot'"
        yield written.with_attribute(name, lambda match: match.tag("actt")), "no either is named 'actt'"


@mistake
def _the_value_of_what_is_not_bound(written, rng):
    for name in written.options.get("attrs", {}):
        yield written.with_attribute(name, lambda match: match.value("wieght")), "nothing is captured or named 'wieght'"


@mistake
def _an_attribute_that_cannot_be_computed(written, rng):
    for name in written.options.get("attrs", {}):
        yield written.with_attribute(name, dtype_of), f"attrs {name!r}: call dtype_of"
        for wrong in (lambda: 1.0, float):
            yield written.with_attribute(name, wrong), f"attrs {name!r}: {wrong!r} is neither"


@mistake
def _an_attribute_that_is_captured(written, rng):
    if written.decorator is not group:
        name = rng.choice([p.name for p in written.parameters() if not p.name.startswith("_")])
        yield written.with_attribute(name, 1.0), f"{name!r} is both captured and in attrs"


@mistake
def _an_attribute_that_is_raised(written, rng):
    for _, part in at_each(written, Raised):
        if name := next((n for n in part.captures() if n in written.given[0].names), None):
            yield written.with_attribute(name, None), f"{name!r} is both in attrs and captured from what was raised"


@mistake
def _an_attribute_left_out(written, rng):
    for name in written.options.get("attrs", {}):
        rest = {n: value for n, value in written.options["attrs"].items() if n != name}
        if written.decorator is rule:
            yield written.given_in("attrs", rest), f"nothing provides [{name!r}]"


@mistake
def _attributes_that_are_no_dict(written, rng):
    if written.decorator is not group:
        yield written.given_in("attrs", [("out_dtype", dtype_of())]), "is not a dict"


@mistake
def _a_decorator_without_parentheses(written, rng):
    bare = replace(written, decorator=lambda: written.decorator, given=(), options={})
    yield bare, f"write @{written.decorator.__name__}(ops."


@mistake
def _an_op_that_is_none(written, rng):
    for wrong in (written.given[0].name, written.given[0].target, 7, ops):
        yield replace(written, given=(wrong,)), f"@{written.decorator.__name__} takes an op of fastlora.kernels.ops"


@mistake
def _a_benefit_that_is_no_integer(written, rng):
    for wrong in ("2", 1.5, None, True):
        yield written.given_in("benefit", wrong), f"benefit={wrong!r} is not an integer"


@mistake
def _a_function_that_raises(written, rng):
    if written.decorator is not group:
        for change in (lambda p: p @ p, lambda p: 1 if p else 2, lambda p: p.anything, lambda p: [*p]):
            raises = lambda p, c=change: c(p[0] if isinstance(p, tuple) else p)  # noqa: E731
            yield written.returning(raises), "its function raises "


@mistake
def _a_function_that_returns_no_pattern(written, rng):
    if written.decorator is not group:
        for wrong in (None, 1.0, "silu", [], silu):
            yield written.returning(lambda _, w=wrong: w), f"returns {wrong!r}"


@mistake
def _outputs_too_many(written, rng):
    if written.decorator is not group:
        more = written.returning(lambda p: (*p, p[1]) if isinstance(p, tuple) else (p, p))
        yield more, f"values, but {written.given[0].name} has"


@mistake
def _a_parameter_that_is_no_argument(written, rng):
    if written.decorator is not group:
        parameters = [p for p in written.parameters() if not p.name.startswith("_")]
        old = rng.choice(parameters)
        wrong = typo(old.name, rng)
        renamed = [p.replace(name=wrong) if p.name == old.name else p for p in written.parameters()]

        def call(captures):
            return written.function(**{old.name if n == wrong else n: v for n, v in captures.items()})

        yield written.taking(renamed, call), f"{wrong!r} is not an argument of"


@mistake
def _a_parameter_that_is_not_used(written, rng):
    if written.decorator is not group:
        more = [*written.parameters(), inspect.Parameter("_more", inspect.Parameter.KEYWORD_ONLY)]
        used = written.taking(more, lambda c: written.function(**{n: v for n, v in c.items() if n != "_more"}))
        yield used, "the parameters ['_more'] do not appear"


@mistake
def _an_annotation_that_is_no_predicate(written, rng):
    if written.decorator is not group:
        chosen = rng.choice([p.name for p in written.parameters()])
        for wrong in (torch.Tensor, float, Param, 2, lambda value: True):
            changed = [p.replace(annotation=wrong) if p.name == chosen else p for p in written.parameters()]
            yield written.taking(changed, lambda c: written.function(**c)), f"of {chosen!r} "


@mistake
def _a_default_of_the_wrong_type(written, rng):
    if written.decorator is not group:
        for chosen in written.parameters():
            if chosen.annotation is Scalar and not chosen.name.startswith("_"):
                changed = [
                    p.replace(default="1.0", kind=p.KEYWORD_ONLY) if p.name == chosen.name else p
                    for p in sorted(written.parameters(), key=lambda p: p.name == chosen.name)
                ]
                yield written.taking(changed, lambda c: written.function(**c)), f"the default {chosen.name}='1.0'"


@mistake
def _a_group_by_nothing_shared(written, rng):
    if written.decorator is group:
        for wrong in (typo(written.options["by"], rng), 3, "lora_a" if written.given[0] is ops.lora_linear else "x"):
            yield written.given_in("by", wrong), repr(wrong)


@mistake
def _a_group_into_what_it_cannot_be(written, rng):
    if written.decorator is group:
        wrong = rng.choice([ops.glu, ops.lora_mlp, ops.linear_cross_entropy])
        yield written.given_in("into", wrong), f"{wrong.name} takes "
        yield written.given_in("into", "lora_group"), "@group takes an op of fastlora.kernels.ops as into"


@mistake
def _a_condition_that_cannot_be_asked(written, rng):
    if written.decorator is group:
        yield replace(written, function=lambda first, second: True), "is not a function of the list of matches"
