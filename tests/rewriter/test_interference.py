"""Random interference with a layer keeps results equal: writes through views, copies, detached and rounded values,
regions without gradients, escaping results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis
import torch
import torch.nn.functional as F
from graphs import analyse, bf16, evaluate, f32, randn
from hypothesis import strategies as st
from torch import Tensor

LAYER = """
x = x * 1.5
s = x.float().pow(2).mean(-1, keepdim=True)
n = (x.float() * torch.rsqrt(s + 1e-6)).to(x.dtype)
h = w * n
base = F.linear(h, wq)
za = h.to(qa.dtype)
inner = F.linear(za, qa)
low = F.linear(inner, qb)
scaled = low * 2.0
q = (base + scaled).to(x.dtype)
base2 = F.linear(h, wk)
low2 = F.linear(F.linear(h.to(ka.dtype), ka), kb)
k = (base2 + low2 * 0.5).to(x.dtype)
left = q[..., :8]
right = q[..., 8:]
rotated = torch.cat((-right, left), dim=-1)
r = q * cos + rotated * sin
active = F.silu(k)
m = active * r
total = x + m
t = total.float()
t2 = t.pow(2).mean(-1, keepdim=True)
y = w * (t * torch.rsqrt(t2 + 1e-6)).to(x.dtype)
z = F.layer_norm(y + total, (16,), w, w, 1e-5)
loss = F.cross_entropy(F.linear(z, head).view(-1, 40).float(), labels)
""".strip().splitlines()
NAMES = ["x", "w", "wq", "qa", "qb", "wk", "ka", "kb", "cos", "sin", "head", "labels"]

WRITES = [
    "{v}.add_(0.5)",
    "{v}[0].mul_(2)",
    "{v} += 0.25",
    "{v}[:, 1] = 0.5",
    "{v}.transpose(0, 1).mul_(0.5)",
    "{v}.view(-1)[3:9].mul_(2)",
    "{v}.detach().mul_(0.5)",
    "{v}.flatten(0, 1)[0].add_(1)",
    "{v}.clone().add_(1)",
]
REBINDINGS = [
    "{v} = {v}.clone()",
    "{v} = {v}.detach()",
    "{v} = {v}.contiguous() * 1.0",
    "{v} = {v}.to(torch.bfloat16).to({v}.dtype)",
    "{v} = {v}.double()",
    "{v} = F.dropout({v}, 0.3)",
]
ESCAPES = ["kept.append({v})", "kept.append({v}.contiguous())", "kept.append({v}.abs().amax())"]

WITHOUT_GRAD = [f"with torch.no_grad(): {line}" for line in REBINDINGS + ESCAPES]


def _assigned(line: str) -> str:
    return line.removeprefix("with torch.no_grad(): ").split(" = ")[0]


def _random_interference(choose: Callable[[int], int]) -> str:
    """Return the source of the layer with one to three random changes."""
    lines = ["kept = []", *LAYER]
    for _ in range(1 + choose(3)):
        at = 2 + choose(len(lines) - 2)
        written = ["x", *(name for line in lines[1:at] if (name := _assigned(line)).isidentifier())]
        v = written[choose(len(written))]
        kind = choose(5)
        if kind == 4:
            line = lines[at - 1]
            if not line.startswith(("with", "kept")):
                lines[at - 1] = f"with torch.no_grad(): {line}"
            continue
        templates = (WRITES, REBINDINGS, ESCAPES, WITHOUT_GRAD)[kind]
        lines.insert(at, templates[choose(len(templates))].format(v=v))
    text = "\n    ".join([*lines, "return loss, total, kept"])
    return f"def function({', '.join(NAMES)}):\n    {text}\n"


def _inputs(dtype: torch.dtype, trains: Callable[[], bool]) -> list[Tensor]:
    def leaf(*shape: int, seed: int, of: torch.dtype = f32) -> Tensor:
        return randn(*shape, seed=seed, dtype=of, grad=trains(), scale=0.5)

    tables = [randn(3, 16, seed=seed, grad=False, dtype=dtype) for seed in (8, 9)]
    return [
        leaf(2, 3, 16, seed=0, of=dtype),
        leaf(16, seed=1, of=dtype),
        *(leaf(16, 16, seed=2, of=dtype), leaf(4, 16, seed=3), leaf(16, 4, seed=4)),
        *(leaf(16, 16, seed=5, of=dtype), leaf(4, 16, seed=6), leaf(16, 4, seed=7)),
        *tables,
        leaf(40, 16, seed=10, of=dtype),
        torch.tensor([3, 39, -100, 0, 7, 7]),
    ]


@hypothesis.settings(max_examples=200, deadline=None, derandomize=True, database=None)
@hypothesis.given(data=st.data())
def test_random_interference_with_a_layer_keeps_results_equal(data: st.DataObject) -> None:
    source = _random_interference(lambda n: data.draw(st.integers(0, n - 1)))
    hypothesis.note(source)
    scope: dict[str, Any] = {"torch": torch, "F": F}
    exec(compile(source, "<layer>", "exec"), scope)
    dtype = data.draw(st.sampled_from([f32, f32, bf16]), "dtype")
    inputs = _inputs(dtype, lambda: data.draw(st.booleans(), "trains"))
    try:
        evaluate(scope["function"], inputs)
    except RuntimeError:  # eager raises as well, such as for a write to a saved tensor
        return
    outcome = analyse(scope["function"], *inputs, fullgraph=False, dynamic=None)
    outcome.assert_close(3e-6 if dtype == f32 and "bfloat16" not in source else 0.1)


def test_a_layer_without_interference_is_fully_fused() -> None:
    scope: dict[str, Any] = {"torch": torch, "F": F}
    body = "\n    ".join([*LAYER, "return loss"])
    exec(f"def function({', '.join(NAMES)}):\n    {body}\n", scope)
    outcome = analyse(scope["function"], *_inputs(f32, lambda: True))
    assert outcome.ops == [
        "add_layer_norm",
        "add_rms_norm",
        "glu",
        "linear_cross_entropy",
        "lora_group",
        "rms_norm",
        "rotary",
    ]
    outcome.assert_tidy()
    outcome.assert_close(3e-6)
