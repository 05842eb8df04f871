"""Random programs over a head's logits, which run the same on ordinary and on deferred logits.

A program is a list of steps. Each reads the logits or values of earlier steps, by position, and may add a value, a term
of the loss, an observation, a hook or a write. The result is everything that a caller can observe.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

VOCABULARY, WIDTH = 11, 4
ROWS = (2, 3)


class PassThrough(torch.autograd.Function):
    """An autograd function that passes its inputs on, as DDP's does."""

    @staticmethod
    def forward(ctx: Any, *tensors: torch.Tensor) -> Any:
        return tuple(t.clone() for t in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients


class CustomCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        p = z.double().softmax(-1)
        ctx.save_for_backward(p, labels)
        return -p.gather(-1, labels[:, None]).log().mean().to(z.dtype)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        p, labels = ctx.saved_tensors
        d = p.clone()
        d[torch.arange(len(labels)), labels] -= 1
        return (g * d / len(labels)).float(), None


@dataclass
class ProgramState:
    """The state of a running program."""

    values: list[torch.Tensor]
    losses: list[torch.Tensor] = field(default_factory=list)
    seen: list[Any] = field(default_factory=list)
    retained: list[torch.Tensor] = field(default_factory=list)

    def labels(self, rows: int, ignored: int = -1) -> torch.Tensor:
        made = (torch.arange(rows) * 5 + 3) % VOCABULARY
        if 0 <= ignored < rows:
            made[ignored] = -100
        return made

    def matrix(self, z: torch.Tensor) -> torch.Tensor:
        return z.reshape(-1, z.shape[-1])


Step = Callable[[ProgramState, torch.Tensor, int], Any]


def _mask(z: torch.Tensor) -> torch.Tensor:
    lead = z.shape[:-1]
    return (torch.arange(lead.numel()) % 3 != 1).reshape(lead)


VALUES: dict[str, Step] = {
    "slice": lambda w, z, k: z[..., :-1, :],
    "first": lambda w, z, k: z[0],
    "last": lambda w, z, k: z[-1:],
    "stride": lambda w, z, k: z[::2],
    "part of the words": lambda w, z, k: z[..., : k + 1],
    "one word": lambda w, z, k: z[..., k],
    "flatten": lambda w, z, k: z.flatten(0, -2),
    "flatten all": lambda w, z, k: z.flatten(),
    "view": lambda w, z, k: z.view(-1, z.shape[-1]),
    "view by keyword": lambda w, z, k: z.view(size=(-1, z.shape[-1])),
    "reshape by keyword": lambda w, z, k: z.reshape(shape=(-1, z.shape[-1])),
    "view as bits": lambda w, z, k: z.detach().view(torch.int32).float(),
    "unsqueeze": lambda w, z, k: z.unsqueeze(k % z.dim()),
    "squeeze": lambda w, z, k: z[:1].squeeze(0),
    "squeeze all": lambda w, z, k: z.squeeze(),
    "unflatten": lambda w, z, k: z.unflatten(0, (1, -1)),
    "transpose": lambda w, z, k: z.transpose(0, 1),
    "movedim": lambda w, z, k: z.movedim(0, -2),
    "permute": lambda w, z, k: z.permute(*range(1, z.dim()), 0),
    "classes second": lambda w, z, k: z.transpose(1, -1),
    "contiguous": lambda w, z, k: z.contiguous(),
    "clone": lambda w, z, k: z.clone(),
    "float": lambda w, z, k: z.float(),
    "double": lambda w, z, k: z.double(),
    "half": lambda w, z, k: z.to(torch.float16),
    "to itself": lambda w, z, k: z.to(z.device, z.dtype, copy=bool(k % 2)),
    "times": lambda w, z, k: z * (k + 0.5),
    "times from the left": lambda w, z, k: 2 * z,
    "over": lambda w, z, k: z / (k + 1.5),
    "floor": lambda w, z, k: torch.div(z, 2, rounding_mode="floor"),
    "negative": lambda w, z, k: -0.5 * z,
    "by a tensor": lambda w, z, k: z * torch.tensor(1.5),
    "cap": lambda w, z, k: torch.tanh(z / 2.0) * 2.0,
    "bias": lambda w, z, k: z + torch.linspace(-1, 1, z.shape[-1]),
    "sum": lambda w, z, k: z + w.values[0].sum(),
    "square": lambda w, z, k: z * z,
    "softmax": lambda w, z, k: z.log_softmax(-1),
    "detach": lambda w, z, k: z.detach(),
    "leaf": lambda w, z, k: z.detach().requires_grad_(),
    "data": lambda w, z, k: z.data,
    "rows by mask": lambda w, z, k: z[_mask(z)],
    "rows by number": lambda w, z, k: z[torch.tensor([0, -1, 0])],
    "rows by pairs": lambda w, z, k: z[torch.tensor([0, 1]), torch.tensor([1, 1])],
    "rows after a slice": lambda w, z, k: z[:, torch.tensor([1, 0, 1])],
    "index_select": lambda w, z, k: z.index_select(k % z.dim(), torch.tensor([1, 0])),
    "words by number": lambda w, z, k: z[..., torch.tensor([1, 3])],
    "chunk": lambda w, z, k: z.chunk(2, k % z.dim())[-1],
    "split and join": lambda w, z, k: torch.cat(z.split([1, z.shape[0] - 1])),
    "rows one by one": lambda w, z, k: torch.stack([row * 1.5 for row in z]),
    "expand": lambda w, z, k: z.unsqueeze(0).expand(2, *z.shape),
    "sink": lambda w, z, k: PassThrough.apply(z)[0],
    "narrow": lambda w, z, k: z.narrow(0, k % z.shape[0], 1),
    "as strided": lambda w, z, k: z.as_strided((2, z.shape[-1]), (z.shape[-1], 1)),
    "no grad": lambda w, z, k: _without_grad(z),
}


def _without_grad(z: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return z[..., :-1, :] * 1.0


def _cross_entropy(w: ProgramState, z: torch.Tensor, k: int) -> torch.Tensor:
    z = w.matrix(z)
    options = [
        {}, {"reduction": "sum"}, {"label_smoothing": 0.1}, {"ignore_index": 3}, {"label_smoothing": 1.5},
        {"reduction": "avg"}, {"weight": torch.linspace(0.5, 1.5, z.shape[-1])},
    ][k % 7]  # fmt: skip
    return F.cross_entropy(z, w.labels(len(z), ignored=k % 4), **options)


LOSSES: dict[str, Step] = {
    "cross-entropy": _cross_entropy,
    "each": lambda w, z, k: F.cross_entropy(w.matrix(z), w.labels(len(w.matrix(z))), reduction="none").square().mean(),
    "by keyword": lambda w, z, k: F.cross_entropy(input=w.matrix(z), target=w.labels(len(w.matrix(z)))),
    "without labels": lambda w, z, k: F.cross_entropy(
        w.matrix(z), torch.full((len(w.matrix(z)),), -100), reduction="sum"
    ) / 0,
    "short labels": lambda w, z, k: F.cross_entropy(w.matrix(z), w.labels(len(w.matrix(z)))[1:]),
    "integers of 32 bits": lambda w, z, k: F.cross_entropy(w.matrix(z), w.labels(len(w.matrix(z))).int()),
    "bytes": lambda w, z, k: F.cross_entropy(w.matrix(z), w.labels(len(w.matrix(z))).to(torch.uint8)),
    "probabilities": lambda w, z, k: F.cross_entropy(w.matrix(z), w.matrix(z).detach().softmax(-1)),
    "own function": lambda w, z, k: CustomCrossEntropy.apply(w.matrix(z), w.labels(len(w.matrix(z)))),
    "mean": lambda w, z, k: z.float().square().mean(),
    "entropy": lambda w, z, k: (z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "reentrant checkpoint": lambda w, z, k: checkpoint(lambda t: _cross_entropy(w, t, 0), z, use_reentrant=True),
    "checkpoint": lambda w, z, k: checkpoint(lambda t: _cross_entropy(w, t, 0), z.clone(), use_reentrant=False),
    "chunks": lambda w, z, k: sum(_cross_entropy(w, part, 1) for part in w.matrix(z).chunk(2)),
}  # fmt: skip


def _read(w: ProgramState, z: torch.Tensor, k: int) -> None:
    contexts = [torch.enable_grad, torch.no_grad, torch.inference_mode]
    with contexts[k % 3]():
        w.seen.append(z.argmax(-1).clone() if k % 2 else z.float().mean().clone())


def _hook(w: ProgramState, z: torch.Tensor, k: int) -> None:
    hooks = [
        lambda g: w.seen.append(g.double().sum()),
        lambda g: g * 2,
        lambda g: g.clone().mul_(0.5),
        lambda g: None,
        lambda g: g[...].fill_(0.25) if k > 7 else g.neg(),
    ]
    z.register_hook(hooks[k % len(hooks)])


def _retain(w: ProgramState, z: torch.Tensor, k: int) -> None:
    z.retain_grad()
    w.retained.append(z)


def _partial_gradient(w: ProgramState, z: torch.Tensor, k: int) -> None:
    loss = _cross_entropy(w, z * 1.0 if k % 2 else z, 0)
    w.seen.append(torch.autograd.grad(loss, z, retain_graph=True)[0] + 0)


EFFECTS: dict[str, Step] = {
    "read": _read,
    "hook": _hook,
    "retain": _retain,
    "gradient for it": _partial_gradient,
    "mul_": lambda w, z, k: z.mul_(2.0),
    "no-grad add_": lambda w, z, k: _in_place_without_grad(z),
    "relu_": lambda w, z, k: F.relu(z, inplace=True),
    "hardtanh": lambda w, z, k: F.hardtanh(z, -0.5, 0.5, inplace=True),
    "set item": lambda w, z, k: z.__setitem__((..., k % 2), 0.25),
    "data clamp_": lambda w, z, k: z.data.clamp_(-0.5, 0.5),
    "detached fill": lambda w, z, k: z.detach()[0].fill_(0.5),
    "out": lambda w, z, k: torch.clamp(z.detach(), -0.4, 0.4, out=z.detach()),
    "foreach": lambda w, z, k: torch._foreach_mul_([z], 0.5),
    "numpy": lambda w, z, k: z.detach().numpy().__setitem__(0, 0.125),
    "list": lambda w, z, k: w.seen.append(torch.tensor(z.tolist())),
    "shape": lambda w, z, k: w.seen.append((tuple(z.shape), z.stride(), z.dtype, z.is_contiguous(), z.requires_grad)),
    "is leaf": lambda w, z, k: w.seen.append((z.is_leaf, z.grad_fn is None)),
    "text": lambda w, z, k: w.seen.append(str(z.detach())),
}


def _in_place_without_grad(z: torch.Tensor) -> None:
    with torch.no_grad():
        z.add_(0.5)


KINDS: list[dict[str, Step]] = [VALUES, LOSSES, EFFECTS]
step = st.sampled_from([(i, name) for i, kind in enumerate(KINDS) for name in kind])
programs = st.lists(st.tuples(step, st.integers(0, 9), st.integers(0, 11)), min_size=1, max_size=6)


def run(program: list[Any], hidden: torch.Tensor, head: Any, parameters: list[torch.Tensor]) -> dict[str, Any]:
    """Run a program on `head(hidden)`; return everything observable: values, gradients, observations, and its error."""
    torch.manual_seed(0)
    world = ProgramState([])
    result: dict[str, Any] = {}
    at = -1
    try:
        world.values.append(head(hidden))
        for at, ((kind, name), which, k) in enumerate(program):  # noqa: B007
            subject = world.values[-1 - which % len(world.values)]
            made = KINDS[kind][name](world, subject, k)
            if kind == 0:
                world.values.append(made)
            elif kind == 1:
                world.losses.append(made)
        at = len(program)
        total = sum(loss.double() for loss in world.losses) + hidden.double().sum() * 0.25
        total.backward()
        result["loss"] = total.detach()
        at += 1
    except Exception as error:
        result["error"] = (at, type(error).__name__)
    tensors = {"hidden": hidden, **{f"parameter {i}": p for i, p in enumerate(parameters)}}
    for label, t in tensors.items():
        result[f"gradient of {label}"] = None if t.grad is None else t.grad.clone()
    for i, t in enumerate(world.retained):
        result[f"retained {i}"] = None if t.grad is None else t.grad + 0
    for i, value in enumerate(world.values):
        result[f"value {i}"] = value.detach().clone()
    for i, seen in enumerate(world.seen):
        result[f"seen {i}"] = seen
    return result
