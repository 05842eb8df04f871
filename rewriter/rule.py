"""Rules: what a subgraph looks like, what must also hold, and the semantic op that it is.

    @rule(ops.glu, anchor=activation, attrs={"out_dtype": dtype_of()})
    def glu(gate, up):
        return silu(gate) * up

A rule is a function that is called once, with patterns. Its parameter names are the captures and the op's argument
names; annotations are predicates; `attrs` gives the arguments that are computed from the match. `@rule` raises a
subgraph to an op, `@fuse` joins ops that were raised, `@group` joins several that share an input. A rule that cannot be
right (an unknown name, an argument that nothing provides, growing alternatives) raises `RuleError` where it is defined.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from fastlora.errors import RuleError
from fastlora.kernels.op import SemanticOp
from fastlora.lint import lint
from fastlora.matching import Pattern, State, Trace, Var
from fastlora.metadata import meta
from fastlora.pattern import Opt, Param, Scalar
from fastlora.view import View

Anchor = str | Callable[[View, fx.Node], bool]
Explanation = Callable[[View, fx.Node], "str | None"]
Verdict = bool | str


@dataclass(eq=False)
class Match:
    """A subgraph that a rule claims: the nodes it replaces, the op's arguments, and the values it stands for."""

    rule: Rule | GroupRule
    view: View
    outputs: tuple[fx.Node, ...]
    members: tuple[fx.Node, ...]
    shared: tuple[fx.Node, ...]
    arguments: dict[str, Any]
    state: State = field(default_factory=State)
    parts: tuple[Match, ...] = ()

    @property
    def op(self) -> SemanticOp:
        return self.rule.op

    @property
    def root(self) -> fx.Node:
        return self.outputs[0]

    def inside(self) -> set[fx.Node]:
        """The nodes that the match covers: its members, and the identities of those that are no outputs."""
        inner = (self.view.value_class(member) for member in self.members if member not in self.outputs)
        return {*self.members, *(same for nodes in inner for same in nodes)}

    def outside_users(self) -> list[fx.Node]:
        """The nodes that will read the replacement's outputs."""
        inside = self.inside() - set(self.shared)
        return [user for output in self.outputs for user in output.users if user not in inside]

    def place(self) -> fx.Node:
        """The node to insert the replacement before: what follows the last output, or an earlier user of another."""
        order = self.view.order
        last = max(self.outputs, key=order.__getitem__)
        return min([last.next, *self.outside_users()], key=order.__getitem__)

    def tag(self, name: str) -> str | None:
        """The alternative that the `either` of this name took, or None if it was not reached."""
        return self.state.tags.get(name)

    def value(self, name: str | None = None) -> Any:
        """What was captured or named; the root without a name."""
        if name is None:
            return self.root
        return self.state.values.get(name, self.state.values.get(f".{name}"))

    def tensor(self, name: str | None = None) -> torch.Tensor:
        """The fake tensor of a captured or named value."""
        tensor = meta(self.value(name))
        assert tensor is not None, f"{self.rule}: {name} holds no tensor"
        return tensor

    def slice_of(self, name: str) -> dict[str, Any]:
        """The bounds (`start`, `stop`, `step`) of a named slice."""
        term = self.view.term(self.value(name))
        assert term is not None, f"{self.rule}: {name} is no slice"
        return term.args

    def dtype(self, name: str | None = None) -> torch.dtype:
        return self.tensor(name).dtype


def dtype_of(name: str | None = None, default: torch.dtype | None = None) -> Callable[[Match], torch.dtype]:
    """For `attrs`: the dtype of a named value (of the root without a name); `default` if it is not in the match."""

    def attribute(match: Match) -> torch.dtype:
        if default is not None and name is not None and match.value(name) is None:
            return default
        return match.dtype(name)

    return attribute


@dataclass(eq=False)
class Rule:
    """One pattern and the op that it is; made by `@rule` and `@fuse`."""

    name: str
    source: str
    op: SemanticOp
    outputs: tuple[Pattern, ...]
    variables: dict[str, Any]
    anchor: Anchor | None
    attrs: dict[str, Any]
    benefit: int
    fuses: bool
    conditions: list[Callable[[Match], Verdict]] = field(default_factory=list)
    explanations: list[Explanation] = field(default_factory=list)

    def __repr__(self) -> str:
        return f"{self.name} ({self.source})"

    def where(self, condition: Callable[[Match], Verdict]) -> Callable[[Match], Verdict]:
        """Decorates a condition on the match that answers True, or a sentence that says why not."""
        self.conditions.append(condition)
        return condition

    def otherwise(self, explanation: Explanation) -> Explanation:
        """Decorates a function of the view and a candidate in no match, which says why if it can tell better than what
        is left of a failed attempt; None if it cannot."""
        self.explanations.append(explanation)
        return explanation

    def find(self, view: View, root: fx.Node) -> Match | None:
        """The first way in which the pattern fits with `root` at its top."""
        for state in self.outputs[0].match(view, root, State(), None):
            return self._match(view, root, state)
        return None

    def trace(self, view: View, root: fx.Node) -> Trace:
        """What failed where when the pattern was tried with `root` at its top."""
        trace = Trace()
        next(self.outputs[0].match(view, root, State(), trace), None)
        return trace

    def _match(self, view: View, root: fx.Node, state: State) -> Match:
        outputs = (view.producer(root), *(state.seen[id(output)] for output in self.outputs[1:]))
        values = {**self.variables, **state.values}
        state = State(values, state.members, state.shared, state.seen, state.tags)
        match = Match(self, view, outputs, _unique(state.members), _unique(state.shared), {}, state)
        wanted = {a.name for a in self.op.arguments}
        match.arguments = {name: value for name, value in values.items() if name in wanted}
        return match

    def complete(self, match: Match) -> None:
        """Computes the arguments that `attrs` declares; only for a match that no condition refuses."""
        match.arguments |= {name: value(match) if callable(value) else value for name, value in self.attrs.items()}

    def refusal(self, match: Match) -> str | None:
        """Why a `where` condition turns the match down, or None."""
        for condition in self.conditions:
            verdict = condition(match)
            if verdict is not True:
                return verdict if isinstance(verdict, str) else f"a condition of {self.name} does not hold"
        return None


@dataclass(eq=False)
class GroupRule:
    """Several matches of one op that agree on an argument become one op whose other tensors are lists."""

    name: str
    source: str
    member: SemanticOp
    op: SemanticOp
    by: str
    benefit: int
    condition: Callable[[list[Match]], Verdict]

    def __repr__(self) -> str:
        return f"{self.name} ({self.source})"

    def find(self, view: View, candidates: list[Match]) -> Iterator[Match]:
        """The groups among the candidates, one for each value that several of them share."""
        shared: dict[Any, list[Match]] = {}
        single = {a.name for a in self.op.arguments if not a.is_list}
        absent = {a.name for a in self.member.arguments} - {a.name for a in self.op.arguments}
        for match in candidates:
            if match.op is self.member and all(match.arguments.get(name) is None for name in absent):
                common = tuple(view.producer(v) for n, v in sorted(match.arguments.items()) if n in single)
                common = (*common, match.tensor().requires_grad)
                shared.setdefault(common, []).append(match)
        for matches in shared.values():
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

    def refusal(self, match: Match) -> str | None:
        return None


def rule(
    op: SemanticOp, *, anchor: Anchor | None = None, attrs: dict[str, Any] | None = None, benefit: int = 0
) -> Callable[[Callable[..., Any]], Rule]:
    """Declares that a subgraph is `op`.

    Args:
        op: the semantic op. Captures and `attrs` together have to provide all its arguments.
        anchor: the operation (or a predicate on view and node) that marks a candidate: each one in a graph is either
            claimed by a match or explained in the report.
        attrs: arguments computed from the match, as constants or functions of the `Match`.
        benefit: preference among overlapping matches; at equal benefit the larger match wins.

    Raises:
        RuleError: where the rule is defined, if it cannot be right.
    """
    return lambda function: _build(function, op, anchor, attrs or {}, benefit, fuses=False)


def fuse(
    op: SemanticOp, *, attrs: dict[str, Any] | None = None, benefit: int = 1
) -> Callable[[Callable[..., Any]], Rule]:
    """Declares that raised ops together are `op`; the function may return several values, the op's outputs."""
    return lambda function: _build(function, op, None, attrs or {}, benefit, fuses=True)


def group(
    member: SemanticOp, *, by: str, into: SemanticOp, benefit: int = 1
) -> Callable[[Callable[[list[Match]], Verdict]], GroupRule]:
    """Declares that matches of `member` which share the argument `by` become one `into`; the function decides which."""

    def build(condition: Callable[[list[Match]], Verdict]) -> GroupRule:
        source = _source(condition)
        names = {a.name for a in member.arguments}
        unknown = [a.name for a in into.arguments if a.name not in names]
        if unknown or by not in names:
            raise RuleError(f"{source}: {into.name} takes {unknown or [by]}, which {member.name} does not have")
        if len([a for a in into.outputs if a.is_list]) != len(into.outputs):
            raise RuleError(f"{source}: the outputs of {into.name} have to be lists, one entry a member")
        return GroupRule(condition.__name__, source, member, into, by, benefit, condition)

    return build


def _build(
    function: Callable[..., Any],
    op: SemanticOp,
    anchor: Anchor | None,
    attrs: dict[str, Any],
    benefit: int,
    fuses: bool,
) -> Rule:
    source = _source(function)
    variables: dict[str, Var] = {}
    defaults: dict[str, Any] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
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
    outputs = function(**variables)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    made = Rule(function.__name__, source, op, outputs, defaults, anchor, attrs, benefit, fuses)
    lint(made, variables)
    return made


def _source(function: Callable[..., Any]) -> str:
    code = function.__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def _unique(nodes: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    return tuple(dict.fromkeys(nodes))


__all__ = ["Anchor", "GroupRule", "Match", "Opt", "Param", "Rule", "Scalar", "dtype_of", "fuse", "group", "rule"]
