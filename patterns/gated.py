"""Candidates for gated units, in any spelling: a product of an activation with another value of its shape.

A unit is counted at its nonlinearity: at `silu`, or at the `sigmoid` of `g * sigmoid(g) * u`, from where products are
followed to the other factor. Every product with a SiLU or a GELU is a gated unit. `sigmoid(g) * u` and the like may
also be gates of attention or of residual branches, and count only if both factors come from linear layers on one input.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import fx

from fastlora.graph.fake_values import meta, same_shape
from fastlora.graph.view import View
from fastlora.patterns.candidates import factors, layer_inputs, name_of, operands, tensors, writes

_SMOOTH = {"silu": "SiLU", "gelu": "GELU", "gelu_tanh": "GELU", "mish": "Mish", "hardswish": "hard swish"}
_SQUASHING = {"sigmoid": "a sigmoid", "special_expit": "a sigmoid", "hardsigmoid": "a hard sigmoid", "tanh": "tanh"}
_ONE_SIDED = {"relu": "ReLU", "relu6": "ReLU6", "leaky_relu": "leaky ReLU", "softplus": "softplus"}
_ONE_SIDED |= {"elu": "ELU", "selu": "SELU", "celu": "CELU"}
_PARTS = {"erf": "erf", "exp": "exp"}
_ACTIVATIONS = _SMOOTH | _SQUASHING | _ONE_SIDED | _PARTS
_WHOLE = {"sigmoid": "SiLU", "special_expit": "SiLU", "exp": "SiLU", "tanh": "GELU", "erf": "GELU"}
"""The activation that a nonlinearity is part of if it is multiplied by its own argument."""

_REACH = 8


@dataclass
class _Unit:
    """A nonlinearity and what it is multiplied by.

    Attributes:
        name: the nonlinearity.
        own: its argument, and values that this is scaled or cast from.
        partners: the other factors.
        products: the nodes from the nonlinearity to its product.
        gates_itself: whether it is multiplied by its own argument.
        squared: whether it is a squared ReLU.
        is_right: whether it is the right factor; with two activations, the left one is counted.
    """

    name: str
    own: list[fx.Node]
    partners: list[fx.Node] = field(default_factory=list)
    products: list[fx.Node] = field(default_factory=list)
    gates_itself: bool = False
    squared: bool = False
    is_right: bool = False


def gating(view: View, node: fx.Node) -> bool:
    """Return whether a node is the nonlinearity of a gated unit, or `F.glu`."""
    return gated_by(view, node) is not None


def gated_by(view: View, node: fx.Node) -> str | None:
    """Return the activation of the gated unit that is counted at a node, in words, or None if there is none."""
    name = name_of(view, node)
    if node.target in (F.glu, torch.ops.aten.glu, torch.ops.aten.glu.default):
        return "F.glu"
    if name not in _ACTIVATIONS or meta(node) is None:
        return None
    unit = _unit(view, node, name)
    others = [other for other in unit.partners if name_of(view, other) in _ACTIVATIONS]
    if not unit.partners or _is_counted_elsewhere(view, node, unit, others):
        return None
    if name in _SMOOTH:
        return _SMOOTH[name]
    if unit.gates_itself:
        return _whole_activation(view, node, name)
    if unit.squared:
        return "squared ReLU"
    return _ACTIVATIONS[name] if name not in _PARTS and not others and _from_one_input(view, node, unit) else None


def why_not(view: View, node: fx.Node, covered: Iterable[str]) -> str | None:
    """Return why no rule matches the unit that is counted at a node, or None if it is a plain spelling of one of the
    `covered` activations."""
    gate = gated_by(view, node)
    if gate == "F.glu":
        return "F.glu takes gate and up as one tensor, which no rule covers"
    if writes(view, node):
        return "the activation writes in place, which no rule covers"
    if any(writes(view, each) for each in _unit(view, node, name_of(view, node)).products):
        return "the product is written in place over the activation, which no rule covers"
    known = gate is None or gate in {_SMOOTH.get(name) for name in covered}
    return None if known else f"gated by {gate}, which no rule covers"


def _unit(view: View, node: fx.Node, name: str) -> _Unit:
    """Follow a nonlinearity to its product with another value, possibly through one with its own argument."""
    activated = meta(node)
    unit, value = _Unit(name, _arguments(view, node, name)), node
    for _ in range(_REACH):
        steps = [(user, found) for user in view.users(value) if (found := _others(view, user, value, name)) is not None]
        if not steps or (unit.partners and (name not in _WHOLE or unit.gates_itself or len(view.users(value)) > 1)):
            break
        step, others = max(steps, key=lambda each: len(each[1]))
        before = len(unit.partners) + unit.gates_itself + unit.squared
        for other in others:
            tensor = meta(other)
            if other in unit.own:
                unit.gates_itself = True
            elif name == "relu" and name_of(view, other) == "relu" and tensors(view, other) == tensors(view, node):
                unit.squared, unit.is_right = True, unit.is_right or view.order[other] < view.order[node]
            elif tensor is not None and activated is not None and same_shape(tensor, activated):
                unit.partners.append(other)
                unit.is_right = unit.is_right or other in factors(view, operands(view, step)[0])
        if name_of(view, step) == "square":
            unit.squared = True
        elif others and before == len(unit.partners) + unit.gates_itself + unit.squared:
            break  # a product with a mask, or with a weight per row
        unit.products.append(step)
        value = step
    return unit


def _others(view: View, user: fx.Node, value: fx.Node, name: str) -> list[fx.Node] | None:
    """Return the other factors of a product with a value, [] for other steps from a nonlinearity to a product, else
    None."""
    step, given = name_of(view, user), operands(view, user)
    if step == "cast" or (step == "square" and name == "relu") or (step == "reciprocal" and name == "exp"):
        return []
    if step == "add" and name in ("exp", "erf", "tanh"):
        return [] if len(tensors(view, user)) == 1 else None
    if step == "div" and given[0] is value:
        return [] if len(tensors(view, user)) == 1 else None
    if step == "mul" or (step == "div" and name == "exp"):
        return [factor for other in given[:2] if other is not value for factor in factors(view, other)]
    return None


def _arguments(view: View, node: fx.Node, name: str) -> list[fx.Node]:
    """Return the argument of a nonlinearity, and the values that this is scaled or cast from."""
    through = {"cast", "neg", "mul", "div"} | ({"add", "pow", "square"} if name == "tanh" else set())
    found = tensors(view, node)[:1] if name in _WHOLE else []
    for each in found:
        if name_of(view, each) in through and len(found) < 2 * _REACH:
            found += [source for source in tensors(view, each) if source not in found]
    return found


def _is_counted_elsewhere(view: View, node: fx.Node, unit: _Unit, others: list[fx.Node]) -> bool:
    """Return whether a unit with two activations is counted at the other one: at a smooth one, otherwise at the
    left."""
    if unit.name in _SMOOTH:
        return unit.is_right and any(name_of(view, other) in _SMOOTH for other in others)
    first = all(view.order[node] < view.order[other] and name_of(view, other) not in _SMOOTH for other in others)
    return not first or (unit.squared and unit.is_right and name_of(view, unit.products[0]) != "square" and not others)


def _whole_activation(view: View, node: fx.Node, name: str) -> str:
    """Return the activation that a nonlinearity is part of, in words."""
    argument = operands(view, node)[0]
    while name_of(view, argument) == "cast":
        argument = operands(view, argument)[0]
    if _WHOLE[name] == "SiLU" and name != "exp" and name_of(view, argument) in ("mul", "div"):
        return "quick-GELU"
    return f"a {_WHOLE[name]} that is spelled out"


def _from_one_input(view: View, node: fx.Node, unit: _Unit) -> bool:
    """Return whether both factors come from linear layers on one input, and the product does not gate a residual
    branch."""
    gate = layer_inputs(view, next(iter(tensors(view, node)), None))
    up = [inputs for other in unit.partners if (inputs := layer_inputs(view, other)) is not None]
    if gate is None or not any(gate & inputs for inputs in up):
        return False
    sums = any(name_of(view, user) in ("add", "sub") for user in view.users(unit.products[-1]))
    return not (sums and unit.name in _SQUASHING)
