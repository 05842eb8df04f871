"""What can be seen to be wrong with a rule without a graph; a rule that fails raises where it is defined."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import TYPE_CHECKING

from fastlora.errors import RuleError
from fastlora.matching import ANYTHING, Either, Kept, Pattern, Raised, Var
from fastlora.pattern import Constant, Scalar

if TYPE_CHECKING:
    from fastlora.rule import Rule


def lint(made: Rule, variables: dict[str, Var]) -> None:
    """Raises RuleError for whatever can be seen to be wrong without a graph."""

    def wrong(text: str) -> RuleError:
        return RuleError(f"{made.source}: rule {made.name}: {text}")

    if not all(isinstance(output, Pattern) for output in made.outputs):
        raise wrong("has to return a pattern, or a tuple of patterns")
    patterns = list(_walk(made.outputs[0]))
    if len(made.outputs) != len(made.op.outputs):
        raise wrong(f"returns {len(made.outputs)} values, but {made.op.name} has {len(made.op.outputs)} outputs")
    if any(output not in patterns for output in made.outputs):
        raise wrong("every further output has to be a part of the first")
    if ANYTHING in made.outputs[0].roots():
        raise wrong("the pattern has no operation at its top")
    used = {p.name for p in patterns if isinstance(p, (Var, Kept))}
    if unused := variables.keys() - used:
        raise wrong(f"the parameters {sorted(unused)} do not appear in the pattern")
    for pattern in patterns:
        if isinstance(pattern, Either):
            for (tag, first), (other, later) in combinations(pattern.alternatives.items(), 2):
                reaches = ANYTHING in first.roots() or first.roots() & later.roots()
                if reaches and first.size() < later.size():
                    raise wrong(f"the alternative {tag} is smaller than {other} after it, and would hide it")
    _lint_arguments(made, variables, patterns, wrong)


def _lint_arguments(
    made: Rule, variables: dict[str, Var], patterns: list[Pattern], wrong: Callable[[str], RuleError]
) -> None:
    arguments = {a.name: a for a in made.op.arguments}
    bundles = [p for p in patterns if isinstance(p, Raised)]
    bundled = {name for p in bundles for name in p.captures()}
    tensors = {p.prefix + a.name for p in bundles for a in p.op.tensors if a.name not in p.overrides}
    captured = {p.name for p in patterns if isinstance(p, (Var, Kept))}
    if unknown := {n for n in captured if n not in arguments and not n.startswith("_")} | (tensors - arguments.keys()):
        raise wrong(f"{sorted(unknown)} are no arguments of {made.op.name}{made.op.schema}")
    if unknown := made.attrs.keys() - arguments.keys():
        raise wrong(f"attrs {sorted(unknown)} are no arguments of {made.op.name}{made.op.schema}")
    provided = captured | bundled | made.attrs.keys()
    if missing := [n for n, a in arguments.items() if n not in provided and not a.is_optional]:
        raise wrong(f"nothing provides {missing} of {made.op.name}{made.op.schema}")
    for name, variable in variables.items():
        if name in arguments and arguments[name].is_tensor == (variable.predicate in (Scalar, Constant)):
            raise wrong(f"{name} is {arguments[name].type} in {made.op.name}{made.op.schema}")
        if variable.optional and name in arguments and not arguments[name].is_optional:
            raise wrong(f"{name} is optional in the pattern, but not in {made.op.name}{made.op.schema}")


def _walk(pattern: Pattern) -> Iterator[Pattern]:
    yield pattern
    inner = (pattern.shape,) if isinstance(pattern, Kept) else pattern.children()
    for child in inner:
        yield from _walk(child)
