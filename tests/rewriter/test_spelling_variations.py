"""Equivalent spellings change neither what is fused nor the results.

A `Writer` writes the source of a function with a random spelling of every step, or the plain one without choices.
Functions contain two or three families with separate inputs, and their statements are interleaved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from graphs import analyse, assert_as_exact, bf16, f32, randn
from hypothesis import strategies as st
from torch import Tensor

IDENTITIES = [
    "{x}",
    "{x}.contiguous()",
    "{x} * 1.0",
    "1 * {x}",
    "{x} / 1",
    "{x}.to({x}.dtype)",
    "{x}.type_as({x})",
    "F.dropout({x}, 0.0)",
    "F.dropout({x}, p=0.3, training=False)",
    "{x}[...]",
]
RESHAPES = ["{x}.view({x}.shape)", "{x}.reshape({x}.shape)", "{x}.view(*{x}.size())"]
"""Identities only for static sizes: a graph reads a dynamic size by a further node."""


@dataclass
class Writer:
    """Writes statements, each assigned to a new variable."""

    prefix: str
    choose: Callable[[int], int]
    reshapes: bool = True
    lines: list[str] = field(default_factory=list)

    def one_of(self, *spellings: str) -> str:
        return self.let(spellings[self.choose(len(spellings))])

    def let(self, expression: str) -> str:
        name = f"{self.prefix}{len(self.lines)}"
        self.lines.append(f"{name} = {expression}")
        return name

    def same(self, x: str) -> str:
        """Return the same value, sometimes through an identity."""
        spellings = [*IDENTITIES, *RESHAPES] if self.reshapes else IDENTITIES
        return x if self.choose(3) < 2 else self.one_of(*[spelling.format(x=x) for spelling in spellings])

    def add(self, x: str, y: str) -> str:
        x, y = self.same(x), self.same(y)
        return self.one_of(f"{x} + {y}", f"{y} + {x}", f"torch.add({x}, {y})", f"{y}.add({x})")

    def add_number(self, x: str, number: str) -> str:
        return self.one_of(f"{x} + {number}", f"{number} + {x}", f"torch.add({x}, {number})", f"{x}.add({number})")

    def mul(self, x: str, y: str) -> str:
        x, y = self.same(x), self.same(y)
        return self.one_of(f"{x} * {y}", f"{y} * {x}", f"torch.mul({x}, {y})", f"{y}.mul({x})", f"torch.mul({y}, {x})")

    def times(self, x: str, number: str) -> str:
        return self.one_of(f"{x} * {number}", f"{number} * {x}", f"torch.mul({x}, {number})", f"{x}.mul({number})")

    def square(self, x: str) -> str:
        return self.one_of(f"{x}.pow(2)", f"{x} * {x}", f"{x} ** 2", f"torch.pow({x}, 2)", f"torch.square({x})")

    def widen(self, x: str) -> str:
        return self.one_of(f"{x}.to(torch.float32)", f"{x}.float()", f"{x}.to(dtype=torch.float32)")

    def cast_like(self, x: str, like: str) -> str:
        """Return a cast to the dtype of `like` that does not use a value of the graph."""
        if like.startswith(self.prefix):
            return self.let(f"{x}.to({like}.dtype)")
        return self.one_of(f"{x}.to({like}.dtype)", f"{x}.type_as({like})", f"{x}.to({like})")

    def mean(self, x: str) -> str:
        return self.one_of(
            f"{x}.mean(-1, keepdim=True)", f"{x}.mean(dim=-1, keepdim=True)", f"torch.mean({x}, 2, keepdim=True)"
        )

    def linear(self, x: str, weight: str) -> str:
        x = self.same(x)
        return self.one_of(
            f"F.linear({x}, {weight})",
            f"F.linear(input={x}, weight={weight})",
            f"F.linear({x}, {weight}, None)",
            f"{x} @ {weight}.T",
            f"torch.matmul({x}, {weight}.t())",
            f"{x}.matmul({weight}.transpose(-1, -2))",
        )


def norm(write: Writer, x: str, weight: str) -> str:
    h = write.same(write.widen(write.same(x)))
    power = write.add_number(write.same(write.mean(write.square(h))), "1e-5")
    style = write.choose(4)
    if style == 3:
        n = write.let(f"{h} / torch.sqrt({power})")
    else:
        n = write.mul(h, write.let([f"torch.rsqrt({power})", f"{power}.pow(-0.5)", f"1.0 / {power}.sqrt()"][style]))
    if write.choose(2):
        return write.cast_like(write.mul(n, write.widen(weight)), x)
    return write.mul(write.same(write.cast_like(n, x)), weight)


def residual_norm(write: Writer, x: str, y: str, weight: str) -> str:
    return norm(write, write.add(x, y), weight)


def rotary(write: Writer, x: str, cos: str, sin: str) -> str:
    style = write.choose(3)
    if style == 0:
        first, second = write.let(f"{x}[..., :4]"), write.let(f"{x}[..., 4:]")
    else:
        halves = write.let([f"{x}.chunk(2, dim=-1)", f"torch.split({x}, 4, dim=-1)"][style - 1])
        first, second = write.let(f"{halves}[0]"), write.let(f"{halves}[1]")
    negated = write.one_of(f"-{second}", f"torch.neg({second})", f"{second}.neg()")
    turn = write.one_of(f"torch.cat(({negated}, {first}), dim=-1)", f"torch.concat([{negated}, {first}], -1)")
    return write.add(write.mul(x, cos), write.mul(turn, sin))


def glu(write: Writer, gate: str, up: str) -> str:
    gate = write.same(gate)
    active = write.one_of(f"F.silu({gate})", f"F.silu(input={gate})", f"torch.nn.SiLU()({gate})")
    return write.mul(active, up)


def lora(write: Writer, x: str, weight: str, a: str, b: str) -> str:
    base = write.linear(x, weight)
    adapted = write.same(write.cast_like(write.same(x), a))
    low = write.linear(write.linear(adapted, a), b)
    return write.cast_like(write.add(base, write.times(low, "2.5") if write.choose(3) < 2 else low), x)


def lora_mlp(write: Writer, x: str, *weights: str) -> str:
    gate, up = lora(write, x, *weights[:3]), lora(write, x, *weights[3:6])
    return lora(write, glu(write, gate, up), *weights[6:])


def loss(write: Writer, x: str, weight: str, labels: str) -> str:
    logits = write.same(write.linear(x, weight))
    scale = write.choose(3)
    logits = logits if scale == 0 else write.times(logits, "0.5") if scale == 1 else write.let(f"{logits} / 2.0")
    flat = write.let(f"{write.widen(logits)}.view(-1, 40)" if write.choose(2) else f"{logits}.reshape(6, 40).float()")
    return write.one_of(
        f"F.cross_entropy({flat}, {labels})",
        f"F.cross_entropy(input={flat}, target={labels}, ignore_index=-100, reduction='mean')",
        f"F.cross_entropy({flat}, {labels}, None, None, -100)",
    )


@dataclass(frozen=True)
class Family:
    """A family: how it is written, the ops that replace it, and its inputs."""

    write: Callable[..., str]
    ops: tuple[str, ...]
    inputs: Callable[[torch.dtype], Sequence[Tensor]]


def _adapter(n: int, k: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    weight = randn(n, k, seed=seed, dtype=dtype, grad=False, scale=0.3)
    return weight, randn(4, k, seed=seed + 1, scale=0.3), randn(n, 4, seed=seed + 2, scale=0.3)


FAMILIES: dict[str, Family] = {
    "norm": Family(norm, ("rms_norm",), lambda t: (randn(2, 3, 16, dtype=t), randn(16, dtype=t))),
    "residual": Family(
        residual_norm,
        ("add_rms_norm",),
        lambda t: (randn(2, 3, 16, dtype=t, seed=1), randn(2, 3, 16, dtype=t, seed=2), randn(16, dtype=t, seed=1)),
    ),
    "rotary": Family(
        rotary,
        ("rotary",),
        lambda t: (randn(2, 3, 5, 8, dtype=t), *(randn(5, 8, dtype=t, seed=s, grad=False) for s in (1, 2))),
    ),
    "glu": Family(glu, ("glu",), lambda t: (randn(2, 3, 16, dtype=t, seed=3), randn(2, 3, 16, dtype=t, seed=4))),
    "lora": Family(lora, ("lora_linear",), lambda t: (randn(2, 3, 16, dtype=t, seed=5), *_adapter(24, 16, 5, t))),
    "mlp": Family(
        lora_mlp,
        ("lora_mlp",),
        lambda t: (
            randn(2, 3, 16, dtype=t, seed=6),
            *_adapter(24, 16, 8, t),
            *_adapter(24, 16, 11, t),
            *_adapter(16, 24, 14, t),
        ),
    ),
    "loss": Family(
        loss,
        ("linear_cross_entropy",),
        lambda t: (randn(2, 3, 16, dtype=t, seed=7), randn(40, 16, dtype=t), torch.tensor([3, 39, -100, 0, 7, 7])),
    ),
}


def _compiled(source: str) -> Callable[..., Any]:
    scope: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(source, "<variation>", "exec"), scope)
    return scope["function"]


def _source(bodies: list[list[str]], results: list[str], names: list[str], pick: Callable[[int], int]) -> str:
    """Return a function with the statements of these bodies, interleaved but in order."""
    queues, lines = [list(body) for body in bodies], []
    while any(queues):
        alive = [queue for queue in queues if queue]
        lines.append(alive[pick(len(alive))].pop(0))
    text = "\n    ".join([*lines, f"return {', '.join(results)},"])
    return f"def function({', '.join(names)}):\n    {text}\n"


def _plain(_: int) -> int:
    return 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_plain_spelling_of_each_family_is_fused(name: str) -> None:
    family = FAMILIES[name]
    inputs = family.inputs(f32)
    names = [f"{name}_{i}" for i in range(len(inputs))]
    write = Writer("v", _plain)
    result = family.write(write, *names)
    outcome = analyse(_compiled(_source([write.lines], [result], names, _plain)), *inputs)
    assert outcome.ops == list(family.ops)
    assert not outcome.misses
    outcome.assert_close()


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_any_equivalent_spelling_is_fused_and_equal(data: st.DataObject) -> None:
    def choose(n: int) -> int:
        return data.draw(st.integers(0, n - 1))

    dtype = data.draw(st.sampled_from([f32, f32, bf16]), "dtype")
    chosen = data.draw(st.lists(st.sampled_from(sorted(FAMILIES)), min_size=1, max_size=3, unique=True), "families")
    dynamic = data.draw(st.sampled_from([None, None, 0, 1]), "dynamic dimension of activations")
    bodies, results, names, inputs = [], [], [], []
    for name in chosen:
        family = FAMILIES[name]
        given = [f"{name}_{i}" for i in range(len(family.inputs(dtype)))]
        write = Writer(f"{name}_v", choose, reshapes=dynamic is None)
        results.append(family.write(write, *given))
        results += [f"torch.sin({given[0]})"] * choose(2)  # a further user of the input
        bodies.append(write.lines)
        names += given
        inputs += _random_inputs(family.inputs(dtype), data, None if name == "loss" else dynamic)
    source = _source(bodies, results, names, choose)
    hypothesis.note(source)
    function = _compiled(source)
    outcome = analyse(function, *inputs, dynamic=None)
    assert outcome.ops == sorted(op for name in chosen for op in FAMILIES[name].ops)
    assert not outcome.misses
    outcome.assert_tidy()
    if dtype == f32:
        outcome.assert_close()
    assert_as_exact(outcome, function, inputs)


def _random_inputs(inputs: Sequence[Tensor], data: st.DataObject, dynamic: int | None) -> list[Tensor]:
    """Return inputs of which a random selection requires gradients, with a dynamic size of the first one."""
    drawn = []
    for tensor in inputs:
        trains = tensor.is_floating_point() and (tensor.requires_grad and data.draw(st.booleans()))
        drawn.append(tensor.detach().clone().requires_grad_(trains))
    if dynamic is not None:
        for tensor in drawn:
            if tensor.dim() >= 3:
                torch._dynamo.mark_dynamic(tensor, dynamic)
    return drawn
