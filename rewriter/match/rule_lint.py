"""Checks of a rule without a graph; a rule that fails one raises where it is defined.

Each check relies on those before it: first the decorator's arguments, then the pattern by itself (`pattern_lint.py`),
then both against the op's schema.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from typing import Any

from fastlora.errors import suggestion
from fastlora.kernels import ops
from fastlora.kernels.core.semantic_op import SemanticOp
from fastlora.match.combinators import Cast, Either, Kept, Raised, Var
from fastlora.match.constants import constant_fault
from fastlora.match.definition import PatternDefinition
from fastlora.match.match import DtypeOf, TagOf, dtype_of, tag_of
from fastlora.match.pattern import ANYTHING, RAISED, Op, Pattern
from fastlora.match.pattern_lint import (
    accepts_positional,
    alternatives,
    faults,
    hidden_alternatives,
    name_collisions,
    subpatterns,
    unknown_operation,
)
from fastlora.match.predicates import Constant, Scalar


def decorator_faults(kind: str, function: Any, given: dict[str, Any], benefit: Any) -> Iterator[str]:
    """Yield what is wrong with a decorator's ops and benefit, and with the decorated function."""
    for name, op in given.items():
        if not isinstance(op, SemanticOp):
            yield f"@{kind} takes an op of fastlora.kernels.ops as {name}, not {op!r}; {_closest_op(op)}"
    if not isinstance(benefit, int) or isinstance(benefit, bool):
        yield f"benefit={benefit!r} is not an integer"
    if not callable(function):
        yield f"@{kind} decorates a function, not {function!r}"


def _closest_op(op: Any) -> str:
    return suggestion(getattr(op, "__name__", op), (f"ops.{name}" for name in ops.__all__))


def anchor_faults(anchor: Any) -> Iterator[str]:
    """Yield what is wrong with an anchor by itself."""
    if isinstance(anchor, str):
        if (unknown := unknown_operation(anchor)) is not None:
            yield f"anchor={anchor!r}: {unknown}"
    elif anchor is not None and (isinstance(anchor, type) or not callable(anchor)):
        yield f"anchor={anchor!r} is neither the name of an operation nor a predicate on the view and a node"
    elif anchor is not None and not accepts_positional(anchor, 2):
        yield f"the anchor {getattr(anchor, '__name__', anchor)} does not take a view and a node"


def pattern_faults(outputs: tuple[Any, ...]) -> Iterator[str]:
    """Yield what is wrong with the patterns that a rule's function has returned, by themselves."""
    for output in outputs or (outputs,):
        if not isinstance(output, Pattern):
            yield f"its function must return a pattern, or a tuple of patterns, and returns {output!r}"
    yield from faults(outputs[0])


def result_faults(result: Any, op: SemanticOp) -> Iterator[str]:
    """Yield what is wrong with the expression around an op, before it is recorded."""
    yield from function_faults(result, len(inspect.signature(result).parameters) if callable(result) else 1, "outputs")
    names = list(inspect.signature(result).parameters)
    if len(names) < len(op.outputs):
        yield f"result= takes {len(names)} values, but {op.name} has {len(op.outputs)} outputs"
    tensors = {a.name for a in op.arguments if a.is_tensor and not a.is_list}
    for name in names[len(op.outputs) :]:
        if name not in tensors:
            yield f"result= takes {name!r}, which is not a tensor argument of {op.name}: {suggestion(name, tensors)}"
    if any(output.is_list for output in op.outputs):
        yield f"result= cannot be given for {op.name}, whose outputs are lists"


def rule_faults(rule: PatternDefinition, variables: dict[str, Var]) -> Iterator[str]:
    """Yield what is wrong with a rule whose pattern is right by itself."""
    yield from _shape_faults(rule, variables)
    for name in name_collisions(rule.outputs[0]):
        yield f"{name!r} is bound twice in one match: rename one of the two, or give a raised op another prefix"
    yield from _capture_faults(rule, variables)
    yield from _attribute_faults(rule, variables)
    yield from _default_faults(rule, variables)


def _shape_faults(rule: PatternDefinition, variables: dict[str, Var]) -> Iterator[str]:
    found = subpatterns(rule.outputs[0])
    if rule.result is None and len(rule.outputs) != len(rule.op.outputs):
        yield f"returns {len(rule.outputs)} values, but {rule.op.name} has {len(rule.op.outputs)} outputs"
    if rule.result is not None:
        yield from rule.result.faults()
        if len(rule.outputs) != rule.result.count:
            yield f"returns {len(rule.outputs)} values, but result= {rule.result.count}"
    if any(output not in found for output in rule.outputs):
        yield "every further output must be a part of the first"
    if len(set(rule.outputs)) < len(rule.outputs):
        yield "two of the outputs are the same value"
    roots = rule.outputs[0].roots()
    if ANYTHING in roots:
        yield "the pattern has no operation at its top"
    if not rule.fuses and any(root.startswith(RAISED) for root in roots):
        yield "a raised op is at the top of the pattern, which only @fuse finds"
    for part in found:
        if isinstance(part, Either):
            yield from hidden_alternatives(part)
    if unused := variables.keys() - {part.name for part in found if isinstance(part, (Var, Kept))}:
        yield f"the parameters {sorted(unused)} do not appear in the pattern"
    named = {part.op for part in found if isinstance(part, Op)}
    named |= {"cast" for part in found if isinstance(part, Cast)}
    if isinstance(rule.anchor, str) and rule.anchor not in named and not any(isinstance(p, Raised) for p in found):
        yield f"anchor={rule.anchor!r} does not occur in the pattern, whose operations are {', '.join(sorted(named))}"


def _capture_faults(rule: PatternDefinition, variables: dict[str, Var]) -> Iterator[str]:
    """Compare captures with the op's arguments."""
    op, found = rule.op, subpatterns(rule.outputs[0])
    arguments = {a.name: a for a in op.arguments}
    captured = {part.name for part in found if isinstance(part, (Var, Kept))}
    from_raised = {name: part for part in found if isinstance(part, Raised) for name in part.captures()}
    for name in sorted(captured - arguments.keys()):
        if not name.startswith("_"):
            own = "the name of any other capture starts with _"
            yield f"{name!r} is not an argument of {op.name}: {suggestion(name, arguments)}; {own}"
    for name in sorted(from_raised.keys() - arguments.keys()):
        remedy = _must_specify(from_raised[name])
        yield f"{name!r} is not an argument of {op.name}: {suggestion(name, arguments)}; {remedy}"
    provided = captured | from_raised.keys() | rule.attrs.keys()
    if missing := [n for n, a in arguments.items() if n not in provided and not a.is_optional]:
        yield f"nothing provides {missing} of {op.name}{op.schema}: capture it, or give it in attrs"
    for name, variable in variables.items():
        if name not in arguments:
            continue
        argument = arguments[name]
        constant = variable.predicate in (Scalar, Constant)
        numeric = argument.type.removesuffix("?") in ("float", "int")
        if argument.is_list or argument.is_tensor == constant or (variable.predicate is Scalar and not numeric):
            yield f"{name} is {argument.type} in {op.name}{op.schema}, which its capture cannot be"
        if variable.optional and not argument.is_optional:
            yield f"{name} is optional in the pattern, but not in {op.name}{op.schema}"


def _must_specify(bundle: Raised) -> str:
    return f"raised(ops.{bundle.op.name}, ...) must specify it as a capture, a constant, or a predicate on one"


def _attribute_faults(rule: PatternDefinition, variables: dict[str, Var]) -> Iterator[str]:
    arguments = {a.name: a for a in rule.op.arguments}
    found = subpatterns(rule.outputs[0])
    captured = {part.name for part in found if isinstance(part, (Var, Kept))}
    from_raised = {name: part for part in found if isinstance(part, Raised) for name in part.captures()}
    for name, value in rule.attrs.items():
        if name not in arguments:
            yield f"attrs {name!r} is not an argument of {rule.op.name}: {suggestion(name, arguments)}"
        elif name in captured:
            yield f"{name!r} is both captured and in attrs: call the capture _{name}, or leave it out of attrs"
        elif name in from_raised:
            yield f"{name!r} is both in attrs and captured from what was raised: {_must_specify(from_raised[name])}"
        elif isinstance(value, (DtypeOf, TagOf)):
            yield from _match_attribute_faults(rule, variables, name, value)
        elif value is dtype_of or value is tag_of:
            yield f"attrs {name!r}: call {value.__name__}, as in {value.__name__}('name')"
        elif isinstance(value, type) or (callable(value) and not accepts_positional(value, 1)):
            yield f"attrs {name!r}: {value!r} is neither a constant nor a function of the match"
        elif callable(value):
            yield from (f"attrs {name!r}: {fault}" for fault in _unbound(rule, value))
        elif (reason := constant_fault(rule.op, arguments[name], value)) is not None:
            yield f"attrs {reason}"


def _match_attribute_faults(
    rule: PatternDefinition, variables: dict[str, Var], name: str, attribute: DtypeOf | TagOf
) -> Iterator[str]:
    """Yield what is wrong with an attribute that is the dtype or the tag of something in the match."""
    type_name = "ScalarType" if isinstance(attribute, DtypeOf) else "str"
    (argument,) = (a for a in rule.op.arguments if a.name == name)
    if argument.type.removesuffix("?") != type_name:
        yield f"attrs {name!r} is {argument.type} in {rule.op.name}{rule.op.schema}, and not {type_name}"
    if isinstance(attribute, TagOf):
        tags = alternatives(rule.outputs[0])
        if attribute.name not in tags:
            yield f"attrs {name!r}: {_no_either(rule, attribute.name)}"
        for tag in sorted(tags.get(attribute.name, ())):
            if (reason := constant_fault(rule.op, argument, tag)) is not None:
                yield f"the alternative {tag} of {attribute.name!r}: attrs {reason}"
    elif attribute.name is not None:
        if attribute.name not in rule.names:
            known = suggestion(attribute.name, rule.names)
            yield f"attrs {name!r}: nothing is captured or named {attribute.name!r}: {known}"
        if attribute.name in variables and variables[attribute.name].predicate in (Scalar, Constant):
            yield f"attrs {name!r}: {attribute.name!r} is not a tensor and has no dtype"


def _default_faults(rule: PatternDefinition, variables: dict[str, Var]) -> Iterator[str]:
    """Check the defaults of parameters, which are the op's arguments if a match does not include the capture."""
    arguments = {a.name: a for a in rule.op.arguments}
    for name, value in rule.variables.items():
        absent = value is None and variables[name].optional
        if name in arguments and not absent and (reason := constant_fault(rule.op, arguments[name], value)) is not None:
            yield f"the default {reason}"


def condition_faults(rule: PatternDefinition, condition: Any) -> Iterator[str]:
    """Yield what is wrong with a condition on a rule's matches."""
    yield from function_faults(condition, 1, "the match")
    yield from _unbound(rule, condition)


def _unbound(rule: PatternDefinition, function: Any) -> Iterator[str]:
    """Yield constant names that a function passes to methods of its first argument, a match, but the rule lacks."""
    code = getattr(function, "__code__", None)
    if code is None or not code.co_argcount:
        return
    steps = list(dis.get_instructions(code))
    for owner, method, name, call in zip(steps, steps[1:], steps[2:], steps[3:], strict=False):
        is_call = name.opname == "LOAD_CONST" and isinstance(name.argval, str) and "CALL" in call.opname
        if is_call and owner.argval == code.co_varnames[0]:
            if method.argval == "tag" and name.argval not in rule.tags:
                yield _no_either(rule, name.argval)
            if method.argval in ("value", "tensor", "dtype", "slice_of") and name.argval not in rule.names:
                yield f"nothing is captured or named {name.argval!r}: {suggestion(name.argval, rule.names)}"


def _no_either(rule: PatternDefinition, name: str) -> str:
    if name in rule.names:
        return f"{name!r} names another pattern, not an either: put .named on the either"
    return f"no either is named {name!r}: {suggestion(name, rule.tags)}"


def group_faults(condition: Any, member: SemanticOp, by: Any, into: SemanticOp) -> Iterator[str]:
    """Yield what is wrong with a group, given that its ops are valid."""
    names = {a.name for a in member.arguments}
    unknown = [a.name for a in into.arguments if a.name not in names]
    if unknown or by not in names:
        yield f"{into.name} takes {unknown or [by]}, which {member.name} does not have: {suggestion(by, names)}"
    if by not in {a.name for a in into.arguments if not a.is_list}:
        single = [a.name for a in into.arguments if not a.is_list]
        yield f"by={by!r} is not an argument that all members of {into.name} share: {suggestion(by, single)}"
    if not all(output.is_list for output in into.outputs):
        yield f"the outputs of {into.name} must be lists, one entry a member"
    yield from function_faults(condition, 1, "the list of matches")


def function_faults(function: Any, count: int, arguments: str) -> Iterator[str]:
    """Yield what is wrong with a function that a rule calls with `count` arguments."""
    if isinstance(function, type) or not callable(function) or not accepts_positional(function, count):
        yield f"{getattr(function, '__name__', function)!r} is not a function of {arguments}"
