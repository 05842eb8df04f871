"""Mutations of valid rules within the pattern; see `rule_mutations.py`."""

from __future__ import annotations

import torch
from rule_mutations import MUTATIONS, at_each, mutation, renamed, set_to, typo

from fastlora.graph.canonical_ops import operations, signature_of
from fastlora.match.combinators import Cast, Either, Kept, Raised
from fastlora.match.dsl import Scalar, silu, tanh
from fastlora.match.pattern import Literal, Named, Op, Pattern
from fastlora.match.pattern_lint import subpatterns
from fastlora.match.rule import group


@mutation
def _unknown_operation(written, rng):
    for at, part in at_each(written, Op):
        wrong = typo(part.op, rng)
        if wrong not in operations():
            yield written.with_part(at, set_to("op", wrong)), f"{wrong!r} is not an operation: did you mean"


@mutation
def _operation_without_canonical_name(written, rng):
    for at, _ in at_each(written, Op):
        wrong = rng.choice(["transpose", "getitem", "contiguous", "clone", "chunk"])
        yield written.with_part(at, set_to("op", wrong)), f"patterns never see {wrong!r}, but "


@mutation
def _unknown_argument_of_an_operation(written, rng):
    for at, part in at_each(written, Op):
        name = rng.choice(list(part.args))
        wrong = typo(name, rng)
        yield written.with_part(at, renamed(name, wrong, "args")), f"{part.op} has no argument {wrong!r}"


@mutation
def _missing_argument_of_an_operation(written, rng):
    for at, part in at_each(written, Op):
        name = rng.choice(signature_of(part.op).required())
        yield written.with_part(at, lambda p, n=name: p.args.pop(n)), f"{part.op} has no default for {name!r}"


@mutation
def _invalid_predicate(written, rng):
    for at, part in at_each(written, Op):
        name = rng.choice(list(part.args))
        for wrong, said in ((float, "float is a type"), (Scalar, "Scalar is not a predicate"), (silu, "silu is not")):
            changed = Op("neg", input=wrong).args["input"]
            yield written.with_part(at, lambda p, n=name, c=changed: p.args.update({n: c})), said


@mutation
def _value_that_is_not_a_pattern(written, rng):
    for at, _ in at_each(written, Cast):
        yield written.with_part(at, set_to("inner", (1, 2))), "(1, 2) is not a pattern"
    for at, _ in at_each(written, Literal):
        yield written.with_part(at, set_to("value", torch.ones(1))), "tensor([1.]) is neither a pattern nor a constant"


@mutation
def _too_few_or_equal_alternatives(written, rng):
    for at, part in at_each(written, Either):
        first = next(iter(part.alternatives.items()))
        yield written.with_part(at, set_to("alternatives", {})), "either has 0 alternatives"
        yield written.with_part(at, set_to("alternatives", dict([first]))), "either has 1 alternatives"
        again = lambda p: setattr(p, "alternatives", {**p.alternatives, "again": next(iter(p.alternatives.values()))})  # noqa: E731
        yield written.with_part(at, again), "are the same pattern, so again is never taken"


@mutation
def _alternative_that_hides_another(written, rng):
    def add_a_longer_one(part):
        first = next(iter(part.alternatives.values()))
        part.alternatives["longer"] = Op(first.op, **{**first.args, "input": tanh(first.args["input"])})

    for at, part in at_each(written, Either):
        first = next(iter(part.alternatives.values()))
        if isinstance(first, Op) and isinstance(first.args.get("input"), Pattern):
            yield written.with_part(at, add_a_longer_one), "is smaller than longer after it, and would hide it"


@mutation
def _name_bound_twice(written, rng):
    captured = [p.name for p in written.parameters() if written.decorator is not group]
    for at, part in at_each(written, Named):
        name = rng.choice([n for n in captured if n in _below(part)] or captured)
        yield written.with_part(at, set_to("name", name)), f"{name!r} is bound twice in one match"


@mutation
def _capture_bound_twice(written, rng):
    captured = [p.name for p in written.parameters()]
    for at, _ in at_each(written, Kept):
        name = rng.choice(captured)
        yield written.with_part(at, set_to("name", name)), f"{name!r} is bound twice in one match"


def _below(part: Pattern) -> set[str]:
    return {inner.name for inner in subpatterns(part) if hasattr(inner, "name")}


@mutation
def _invalid_name(written, rng):
    for at, _ in at_each(written, Named):
        wrong = rng.choice([3, None, "", "a name"])
        yield written.with_part(at, set_to("name", wrong)), f"the name {wrong!r} is not an identifier"


@mutation
def _unknown_override(written, rng):
    for at, part in at_each(written, Raised):
        name = rng.choice(list(part.overrides))
        wrong = typo(name, rng)
        yield written.with_part(at, renamed(name, wrong, "overrides")), f"{part.op.name} has no argument {wrong!r}"


@mutation
def _unused_argument_of_a_raised_op(written, rng):
    for at, part in at_each(written, Raised):
        for name in sorted(part.overrides.keys() & {"dropout", "base_dtype"}):
            without = written.with_part(at, lambda p, n=name: p.overrides.pop(n))
            yield without, f"{part.prefix}{name}' is not an argument of lora_mlp"


@mutation
def _prefix_used_twice(written, rng):
    raisings = [(at, part) for at, part in at_each(written, Raised) if part.prefix]
    for at, part in raisings:
        other = rng.choice([p.prefix for _, p in raisings if p is not part])
        yield written.with_part(at, set_to("prefix", other)), f"{other}weight' is bound twice in one match"


@mutation
def _invalid_raised_op(written, rng):
    for at, part in at_each(written, Raised):
        yield written.with_part(at, set_to("op", part.op.name)), "raised takes an op of fastlora.kernels.ops"
        yield written.with_part(at, set_to("prefix", None)), "the prefix None"


__all__ = ["MUTATIONS"]
