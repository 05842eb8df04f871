"""Rules: the pattern of a subgraph, further conditions, and the semantic op that replaces it.

    @rule(ops.glu, anchor=activation, attrs={"out_dtype": dtype_of()})
    def glu(gate, up):
        return silu(gate) * up

A rule is a function that is called once, with patterns. Its parameters are the captures, named after the op's
arguments; annotations are predicates; `attrs` gives the arguments that are computed from the match. `@rule` raises a
subgraph to an op, `@fuse` joins ops that were raised, `@group` joins several ops that share an input. A rule that
cannot be right (an unknown name, a missing argument, a value that the op does not take, an alternative that hides a
larger one) raises `RuleError` where it is defined.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from fastlora.errors import RuleError, written_at
from fastlora.graph.view import View
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.match.combinators import Var
from fastlora.match.constants import constant_fault
from fastlora.match.definition import Anchor, Definition, PatternDefinition
from fastlora.match.match import Match, dtype_of, tag_of
from fastlora.match.pattern_lint import alternatives, bound_names
from fastlora.match.predicates import Opt, Param, Scalar
from fastlora.match.result import Result
from fastlora.match.rule_lint import (
    anchor_faults,
    condition_faults,
    decorator_faults,
    function_faults,
    group_faults,
    pattern_faults,
    result_faults,
    rule_faults,
)
from fastlora.match.state import State, Trace

Explanation = Callable[[View, fx.Node], "str | None"]
Verdict = bool | str


@dataclass(eq=False, kw_only=True, repr=False)
class Rule(PatternDefinition):
    """A pattern and the op that replaces its matches; made by `@rule` and `@fuse`."""

    conditions: list[Callable[[Match], Verdict]] = field(default_factory=list)
    explanations: list[Explanation] = field(default_factory=list)

    def where(self, condition: Callable[[Match], Verdict]) -> Callable[[Match], Verdict]:
        """Decorate a function of the match, which returns True or a sentence that says why the rule does not apply."""
        _raise_first(condition, condition_faults(self, condition))
        self.conditions.append(condition)
        return condition

    def otherwise(self, explanation: Explanation) -> Explanation:
        """Decorate a function of the view and a candidate without a match, which returns why there is none.

        If it returns None, the report explains the attempt to match that came furthest.
        """
        _raise_first(explanation, function_faults(explanation, 2, "the view and a node"))
        self.explanations.append(explanation)
        return explanation

    def find(self, view: View, root: fx.Node) -> Match | None:
        """Return the first match with this root, or None."""
        for state in self.outputs[0].match(view, root, State(), None):
            if all(id(output) in state.seen for output in self.outputs):  # one of a chain in another order may not be
                return self._match(view, root, state)
        return None

    def trace(self, view: View, root: fx.Node) -> Trace:
        """Return why attempts to match the pattern at this root failed."""
        trace = Trace()
        next(self.outputs[0].match(view, root, State(), trace), None)
        return trace

    def _match(self, view: View, root: fx.Node, state: State) -> Match:
        outputs = (view.producer(root), *(state.seen[id(output)] for output in self.outputs[1:]))
        values = {**self.variables, **state.values}
        state = State(values, state.members, state.shared, state.seen, state.tags)
        match = Match(self, view, outputs, _unique(state.members), _unique(state.shared), {}, state)
        names = {a.name for a in self.op.arguments}
        match.arguments = {name: value for name, value in values.items() if name in names}
        return match

    def compute_attrs(self, match: Match) -> None:
        """Compute the arguments in `attrs`, for a match that no condition rejects."""
        for name, value in self.attrs.items():
            computed = value(match) if callable(value) else value
            (argument,) = (a for a in self.op.arguments if a.name == name)
            is_constant = not argument.is_tensor and not isinstance(computed, fx.Node)
            if is_constant and (reason := constant_fault(self.op, argument, computed)) is not None:
                raise RuleError(f"{self.source}: rule {self.name}: attrs {reason}")
            match.arguments[name] = computed

    def failed_condition(self, match: Match) -> str | None:
        """Return why a `where` condition rejects the match, or None if all hold."""
        for condition in self.conditions:
            verdict = condition(match)
            if verdict is not True:
                return verdict if isinstance(verdict, str) else f"a condition of {self.name} does not hold"
        return None


@dataclass(eq=False, kw_only=True, repr=False)
class GroupRule(Definition):
    """A rule that joins matches of one op with a common argument into one op, whose other tensors are lists."""

    member: SemanticOp
    by: str
    condition: Callable[[list[Match]], Verdict]

    def find(self, view: View, candidates: list[Match]) -> Iterator[Match]:
        """Yield a group for each value that several candidates share."""
        groups: dict[Any, list[Match]] = {}
        common = {a.name for a in self.op.arguments if not a.is_list}
        unsupported = {a.name for a in self.member.arguments} - {a.name for a in self.op.arguments}
        for match in candidates:
            if match.op is self.member and all(match.arguments.get(name) is None for name in unsupported):
                values = tuple(view.producer(v) for n, v in sorted(match.arguments.items()) if n in common)
                groups.setdefault((*values, match.tensor().requires_grad), []).append(match)
        for matches in groups.values():
            if len(matches) > 1 and self.condition(matches) is True:
                yield self._match(view, matches)

    def _match(self, view: View, matches: list[Match]) -> Match:
        first = matches[0].arguments
        arguments = {
            a.name: [m.arguments.get(a.name) for m in matches] if a.is_list else first[a.name]
            for a in self.op.arguments
        }
        outputs = tuple(match.root for match in matches)
        members = _unique(tuple(n for m in matches for n in m.members))
        shared = _unique(tuple(n for m in matches for n in m.shared))
        return Match(self, view, outputs, members, shared, arguments, parts=tuple(matches))


AnyRule = Rule | GroupRule


def rule(
    op: SemanticOp,
    *,
    anchor: Anchor | None = None,
    attrs: dict[str, Any] | None = None,
    benefit: int = 0,
    result: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Rule]:
    """Declare that a subgraph is `op`, or an expression around it.

    Args:
        op: the semantic op. Captures and `attrs` together must provide all its arguments.
        anchor: the operation (or a predicate on view and node) that marks a candidate: each one in a graph is either
            claimed by a match or explained in the report.
        attrs: arguments computed from the match, as constants or functions of the `Match`.
        benefit: preference among overlapping matches; at equal benefit the larger match wins.
        result: the expression around the op that the subgraph computes, if not the op itself: a function of the op's
            outputs, then of arguments of the op by their names, as in `lambda loss, labels: -loss.view_as(labels)`. It
            may negate, add, subtract, multiply, divide, slice, cast and reshape.

    Raises:
        RuleError: where the rule is defined, if it cannot be right.
    """
    if anchor is None and attrs is None and inspect.isfunction(op):
        raise _missing_op_error("rule", op)
    return lambda function: _build(function, op, anchor, attrs, benefit, result, fuses=False)


def fuse(
    op: SemanticOp, *, attrs: dict[str, Any] | None = None, benefit: int = 1
) -> Callable[[Callable[..., Any]], Rule]:
    """Declare that ops found by rules together are `op`; the function may return several values, the op's outputs."""
    if attrs is None and inspect.isfunction(op):
        raise _missing_op_error("fuse", op)
    return lambda function: _build(function, op, None, attrs, benefit, None, fuses=True)


def group(
    member: SemanticOp, *, by: str = "", into: SemanticOp | None = None, benefit: int = 1
) -> Callable[[Callable[[list[Match]], Verdict]], GroupRule]:
    """Declare that matches of `member` with the same argument `by` become one `into`, if the function returns True."""
    if into is None and inspect.isfunction(member):
        raise _missing_op_error("group", member)

    def build(condition: Callable[[list[Match]], Verdict]) -> GroupRule:
        _raise_first(condition, decorator_faults("group", condition, {"member": member, "into": into}, benefit))
        assert into is not None
        _raise_first(condition, group_faults(condition, member, by, into))
        return GroupRule(
            name=_name(condition), source=_source(condition), member=member, op=into, by=by, benefit=benefit,
            condition=condition,
        )  # fmt: skip

    return build


def _build(
    function: Callable[..., Any],
    op: SemanticOp,
    anchor: Anchor | None,
    attrs: dict[str, Any] | None,
    benefit: int,
    result: Callable[..., Any] | None,
    fuses: bool,
) -> Rule:
    _raise_first(function, decorator_faults("fuse" if fuses else "rule", function, {"op": op}, benefit))
    _raise_first(function, anchor_faults(anchor))
    attrs = {} if attrs is None else attrs
    if not isinstance(attrs, dict):
        raise _rule_error(function, f"attrs={attrs!r} is not a dict from the op's arguments to their values")
    try:
        variables, defaults = _parameters(function)
        outputs = function(**variables)
    except Exception as problem:
        raise _rule_error(function, f"its function raises {type(problem).__name__}: {problem}") from problem
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    _raise_first(function, pattern_faults(outputs))
    made = Rule(
        name=_name(function), source=_source(function), op=op, outputs=outputs, variables=defaults, anchor=anchor,
        attrs=attrs, benefit=benefit, result=_result(function, result, op), fuses=fuses,
        names=frozenset(bound_names(outputs[0])), tags=frozenset(alternatives(outputs[0])),
    )  # fmt: skip
    _raise_first(function, rule_faults(made, variables))
    return made


def _result(function: Callable[..., Any], result: Any, op: SemanticOp) -> Result | None:
    """Record the expression around the op, if there is one."""
    if result is None:
        return None
    _raise_first(function, result_faults(result, op))
    try:
        return Result(result, op)
    except Exception as problem:
        raise _rule_error(function, f"result= raises {type(problem).__name__}: {problem}") from problem


def _parameters(function: Callable[..., Any]) -> tuple[dict[str, Var], dict[str, Any]]:
    """Return the captures of a rule's parameters, and the values of those that a match does not include."""
    variables: dict[str, Var] = {}
    defaults: dict[str, Any] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise TypeError(f"its parameter {parameter} is not a capture: write one parameter for each")
        annotation = parameter.annotation
        optional = annotation is Opt or isinstance(annotation, Opt)
        predicate = annotation.predicate if isinstance(annotation, Opt) else annotation
        if predicate in (inspect.Parameter.empty, Opt):
            predicate = None
        variables[name] = Var(name, predicate, optional)
        if parameter.default is not inspect.Parameter.empty:
            defaults[name] = parameter.default
        elif optional:
            defaults[name] = None
    return variables, defaults


def _raise_first(function: Any, faults: Iterable[str]) -> None:
    """Raise the first fault, if any, as a `RuleError` of the rule that the function defines."""
    for fault in faults:
        raise _rule_error(function, fault)


def _rule_error(function: Any, text: str) -> RuleError:
    return RuleError(f"{_source(function)}: rule {_name(function)}: {text}")


def _missing_op_error(decorator: str, function: Any) -> RuleError:
    arguments = "ops.member, by='x', into=ops.together" if decorator == "group" else "ops.name"
    return _rule_error(function, f"@{decorator} needs the op: write @{decorator}({arguments})")


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))


def _source(function: Any) -> str:
    """Return `file:line` of the function that defines a rule, or of the calling code for anything else."""
    code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
    return written_at() if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def _unique(nodes: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    return tuple(dict.fromkeys(nodes))


__all__ = [
    "Anchor", "AnyRule", "GroupRule", "Match", "Opt", "Param", "Rule", "Scalar", "dtype_of", "fuse", "group", "rule",
    "tag_of",
]  # fmt: skip
