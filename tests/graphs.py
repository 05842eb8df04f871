"""Runs a function in eager mode and rewritten, and returns what the rewriting did: graphs, chosen and refused matches,
and outputs and gradients of both runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.utils._pytree import tree_leaves

from fastlora.frontend.session import default_rules
from fastlora.graph.view import View
from fastlora.kernels.core.call_site import CallSite
from fastlora.kernels.core.library import REGISTERED
from fastlora.lower.lowering import lower
from fastlora.match.rule import AnyRule, Match
from fastlora.reports.from_rewrite import misses
from fastlora.reports.model import Miss
from fastlora.rewrite.pipeline import rewrite
from fastlora.rewrite.refusal import Code, Refusal
from fastlora.rewrite.state import Rewrite

Function = Callable[..., Any]
f32, bf16, f64 = torch.float32, torch.bfloat16, torch.float64


def called(node: fx.Node) -> Any:
    """Return the target of a node; for an op, its operator, also if the graph was lowered to call sites."""
    return node.target.op.target if isinstance(node.target, CallSite) else node.target


@dataclass
class Run:
    """The output tensors of a run, and the gradients of the inputs that require one."""

    outputs: list[torch.Tensor]
    gradients: list[torch.Tensor | None]

    def tensors(self) -> list[torch.Tensor | None]:
        return [*self.outputs, *self.gradients]


@dataclass
class Outcome:
    """The results of a function, in eager mode and rewritten."""

    before: list[str]
    modules: list[fx.GraphModule]
    rewrites: list[Rewrite]
    misses: list[Miss]
    eager: Run
    rewritten: Run

    @property
    def ops(self) -> list[str]:
        """The fused ops in the rewritten graphs, checkpointed bodies included, sorted by name."""
        return sorted(str(called(node)).split(".")[1] for node in self.fused_nodes())

    def fused_nodes(self) -> Iterator[fx.Node]:
        for made in self.rewrites:
            yield from (node for node in made.graph.nodes if called(node) in REGISTERED)

    def targets(self) -> list[str]:
        """Return the names of the functions that the rewritten graphs call, in order."""
        calls = [node for made in self.rewrites for node in made.graph.nodes if node.op.startswith("call")]
        return [str(getattr(called(node), "__name__", node.target)) for node in calls]

    @property
    def chosen(self) -> list[Match]:
        return [match for made in self.rewrites for match in made.chosen]

    @property
    def refused(self) -> list[tuple[Match, Refusal]]:
        return [pair for made in self.rewrites for pair in made.refused]

    def codes(self) -> set[Code]:
        """Return the codes of all refusals."""
        return {refusal.code for _, refusal in self.refused}

    def missed(self) -> str:
        """Return why candidates are not fused, as one string."""
        return "\n".join(f"{miss.op}: {miss.reason}" for miss in self.misses)

    def turned_down(self) -> str:
        """Return why matches were refused, as one string."""
        return "\n".join(f"{match.op.name}: {refusal}" for match, refusal in self.refused)

    def assert_identical(self) -> None:
        """Assert that the rewritten run equals eager bit for bit."""
        for position, (actual, expected) in enumerate(self._pairs()):
            assert (actual is None) == (expected is None), f"result {position}: one run has no gradient"
            if actual is not None and expected is not None:
                torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)

    def assert_close(self, tolerance: float = 1e-6) -> None:
        """Assert that the rewritten run equals eager up to rounding, relative to the norm of each result."""
        for actual, expected in zip(self.rewritten.outputs, self.eager.outputs, strict=True):
            assert actual.stride() == expected.stride(), "an output has other strides"
        for position, (actual, expected) in enumerate(self._pairs()):
            assert (actual is None) == (expected is None), f"result {position}: one run has no gradient"
            if actual is not None and expected is not None:
                assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
                error = distance(actual, expected)
                assert error <= tolerance, f"result {position} is off by {error:.1e}"

    def assert_tidy(self) -> None:
        """Assert that nothing is computed twice: every fused op is used, and the nodes that it replaced are erased."""
        for node in self.fused_nodes():
            assert node.users, f"{node.name} is never used"
        for match in self.chosen:
            left = [n.name for n in match.members if n in set(match.view.graph.nodes) and n not in match.shared]
            assert not left, f"{match.rule.name} left {left} behind"

    def _pairs(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
        for actual, expected in zip(self.rewritten.outputs, self.eager.outputs, strict=True):
            assert actual.requires_grad == expected.requires_grad, "requires_grad of an output changed"
        yield from zip(self.rewritten.tensors(), self.eager.tensors(), strict=True)


def distance(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the relative distance in the norm of the whole tensor."""
    actual, truth = actual.detach().double(), truth.detach().double()
    return float((actual - truth).norm() / truth.norm().clamp_min(1e-30))


def randn(*shape: int, dtype: torch.dtype = f32, grad: bool = True, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Return a random leaf, which depends only on shape and seed."""
    generator = torch.Generator().manual_seed(1000 * seed + sum(shape))
    values = torch.randn(shape, generator=generator, dtype=f64) * scale
    return values.to(dtype).requires_grad_(grad)


def fresh(inputs: Sequence[Any]) -> list[Any]:
    """Copy the inputs to new leaves; one that occurs twice stays one tensor, and dynamic sizes stay dynamic."""
    copies: dict[int, Any] = {}
    for value in inputs:
        if isinstance(value, torch.Tensor) and id(value) not in copies:
            copy = copies[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
            for dimension in getattr(value, "_dynamo_dynamic_indices", ()):
                torch._dynamo.mark_dynamic(copy, dimension)
    return [copies.get(id(value), value) for value in inputs]


def evaluate(function: Function, inputs: Sequence[Any]) -> Run:
    """Run forward and backward on copies of the inputs, from a fixed random state."""
    own = fresh(inputs)
    torch.manual_seed(0)
    outputs = [t for t in tree_leaves(function(*own)) if isinstance(t, torch.Tensor)]
    generator = torch.Generator().manual_seed(1)
    incoming = [torch.randn(t.shape, generator=generator, dtype=f64).to(t.dtype) for t in outputs]
    ends = [(t, g) for t, g in zip(outputs, incoming, strict=True) if t.requires_grad]
    wanted = [t for t in dict.fromkeys(own) if isinstance(t, torch.Tensor) and t.requires_grad]
    gradients: list[torch.Tensor | None] = [None] * len(wanted)
    if ends and wanted:
        tensors, cotangents = zip(*ends, strict=True)
        gradients = list(torch.autograd.grad(tensors, wanted, cotangents, allow_unused=True))
    return Run(outputs, gradients)


def trace(function: Function, inputs: Sequence[Any], dynamic: bool = False) -> tuple[fx.GraphModule, list[Any]]:
    """Return the single graph that TorchDynamo captures of a function, and its inputs."""
    captured: list[tuple[fx.GraphModule, list[Any]]] = []

    def backend(gm: fx.GraphModule, given: list[Any]) -> Callable[..., Any]:
        captured.append((gm, list(given)))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic)(*fresh(inputs))
    assert len(captured) == 1
    return captured[0]


def view_of(function: Function, *inputs: Any) -> View:
    """Return the canonical view of a function's graph."""
    return View(trace(function, inputs)[0].graph)


def analyse(
    function: Function,
    *inputs: Any,
    rules: Sequence[AnyRule] | None = None,
    verify: bool = False,
    dynamic: bool | None = False,
    fullgraph: bool = True,
) -> Outcome:
    """Run a function in eager mode and rewritten, by default with the default rules."""
    rules = default_rules() if rules is None else rules
    before: list[str] = []
    modules: list[fx.GraphModule] = []
    rewrites: list[Rewrite] = []

    def backend(gm: fx.GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
        before.append(gm.print_readable(print_output=False))
        rewrites.extend(rewrite(gm, rules, verify))
        modules.append(gm)
        return lower(gm, given, "eager", "default")

    torch._dynamo.reset()
    eager = evaluate(function, inputs)
    rewritten = evaluate(torch.compile(function, backend=backend, fullgraph=fullgraph, dynamic=dynamic), inputs)
    missed = [miss for made in rewrites for miss in misses(made, "", 1)]
    return Outcome(before, modules, rewrites, missed, eager, rewritten)


def in_double(inputs: Sequence[Any]) -> list[Any]:
    """Return the inputs with all floating-point tensors in float64."""
    copies = {id(v): v.detach().double().requires_grad_(v.requires_grad) for v in inputs if _is_float(v)}
    return [copies.get(id(value), value) for value in inputs]


def assert_as_exact(outcome: Outcome, function: Function, inputs: Sequence[Any]) -> None:
    """Assert that the rewritten run's distance from the float64 result is at most 1.25 times eager's, plus two
    roundings to the coarsest dtype of inputs and outputs."""
    truth = evaluate(function, in_double(inputs))
    floor = 2 * max(torch.finfo(t.dtype).eps for t in (*inputs, *outcome.eager.outputs) if _is_float(t))
    for actual, expected, true in zip(
        outcome.rewritten.tensors(), outcome.eager.tensors(), truth.tensors(), strict=True
    ):
        assert (actual is None) == (expected is None) == (true is None)
        if actual is not None and expected is not None and true is not None:
            assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
            allowed = 1.25 * distance(expected, true) + floor
            assert distance(actual, true) <= allowed, (
                f"{distance(actual, true):.1e} off, eager {distance(expected, true):.1e}"
            )


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


# ---- code of models


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """RMSNorm as in Llama, which rounds before the multiplication by the weight."""
    h = x.float()
    n = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    return n if weight is None else weight * n


def lora(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float = 2.0, p: float = 0.0
) -> torch.Tensor:
    """A LoRA layer as in PEFT: the adapter computes in its own dtype."""
    result = F.linear(x, weight)
    dtype = result.dtype
    z = F.dropout(x.to(a.dtype), p, training=p > 0)
    return (result + F.linear(F.linear(z, a), b) * scaling).to(dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding as in Llama."""
    return x * cos + rotate_half(x) * sin


# ---- graphs that only look like a fusible one


@dataclass(frozen=True)
class Lookalike:
    """A graph in which a family's op would be wrong.

    Attributes:
        function, inputs: the function to trace, and its inputs.
        ops: smaller ops that are legal; without any, results must not change by a bit.
        missed: part of the message of a `Miss` in the report, for a candidate that is not fused.
        refused: part of the refusal of the larger match, if smaller ops are fused.
    """

    name: str
    function: Function
    inputs: Sequence[Any]
    ops: tuple[str, ...] = ()
    missed: str = ""
    refused: str = ""
    dynamic: bool = False
    fullgraph: bool = True

    def __str__(self) -> str:
        return self.name

    def check(self) -> None:
        outcome = analyse(self.function, *self.inputs, dynamic=self.dynamic, fullgraph=self.fullgraph)
        assert outcome.ops == sorted(self.ops), f"fused {outcome.ops}, turned down {outcome.turned_down()!r}"
        if self.ops:
            outcome.assert_close(2e-6)
        else:
            outcome.assert_identical()
        outcome.assert_tidy()
        assert self.missed in outcome.missed(), f"missed {outcome.missed()!r}"
        assert self.refused in outcome.turned_down(), f"turned down {outcome.turned_down()!r}"


# ---- ways to write to a tensor in place, itself or through a view


def _setitem(x: torch.Tensor) -> None:
    x[:, 0] = 0.5


def _augment_slice(x: torch.Tensor) -> None:
    x[:, :2] += 1


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "add_": lambda x: x.add_(1),
    "iadd": lambda x: x.__iadd__(1),
    "setitem": _setitem,
    "slice +=": _augment_slice,
    "copy_": lambda x: x.copy_(x.flip(0)),
    "relu_": lambda x: F.relu(x, inplace=True),
    "dropout in place": lambda x: F.dropout(x, 0.5, True, inplace=True),
    "out=": lambda x: torch.mul(x.detach(), 3, out=x.detach()),
    "detach": lambda x: x.detach().mul_(2),
    "data": lambda x: x.data.mul_(2),
    "row": lambda x: x[0].add_(1),
    "slice of the first dimension": lambda x: x[:1].mul_(2),
    "slice of the last dimension": lambda x: x[..., :4].mul_(2),
    "transpose": lambda x: x.transpose(0, 1).mul_(2),
    "matrix transpose": lambda x: x.mT.mul_(2),
    "flatten": lambda x: x.flatten(0, 1).mul_(2),
    "view": lambda x: x.view(6, 16).mul_(2),
    "view of a view": lambda x: x.view(6, 16)[1:].mul_(2),
    "view as integers": lambda x: x.detach().view(torch.int32).bitwise_and_(0),
    "unsqueeze": lambda x: x.unsqueeze(0).mul_(2),
    "permute": lambda x: x.permute(2, 0, 1).mul_(2),
    "expand_as": lambda x: x.expand_as(x).mul_(2),
    "chunk": lambda x: x.detach().chunk(2, 0)[0].mul_(2),
    "split": lambda x: x.detach().split([1, 2], 1)[1].mul_(2),
    "unbind": lambda x: x.detach().unbind(0)[0].mul_(2),
    "select": lambda x: x.select(1, 2).fill_(3.0),
    "masked_fill_": lambda x: x.masked_fill_(x > 0, 0.0),
}
