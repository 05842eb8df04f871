"""Refusals: why a candidate is not fused, as a code, the node at fault, and a sentence for the report."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import fx


class Code(Enum):
    """The kind of reason why a candidate is not fused."""

    ESCAPES = "an intermediate value is used outside the match"
    ORDER = "an output is used before all inputs are there"
    EFFECT = "a node is random, or something is written in place"
    MODE = "gradient mode, autocast or a torch.func transform differs within the match"
    AUTOGRAD = "the outputs would not require gradients where they did"
    SUBCLASS = "an argument is a tensor subclass"
    METADATA = "shape, dtype, device or strides would change"
    GUARDS = "it would add guards on dynamic shapes"
    QUANTIZED = "the op does not read that weight in 4 bits"
    NUMERICS = "a replay of the match disagrees with the op"
    CONDITION = "a condition of the rule does not hold"
    OVERLAP = "a preferred match covers the same nodes"
    HEAD = "the output head is more than a linear layer"
    PATTERN = "no rule matches around the candidate"


@dataclass(frozen=True)
class Refusal:
    """Why a candidate is not fused.

    Attributes:
        code: the kind of reason.
        node: the node at fault, or None if there is no single node.
        text: the sentence that reports show.
    """

    code: Code
    node: fx.Node | None
    text: str

    def __str__(self) -> str:
        return self.text
