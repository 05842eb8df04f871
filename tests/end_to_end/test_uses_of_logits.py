"""Uses of a model's logits outside its own loss have eager's losses, gradients and observations."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tiny_models import batch, build, relative
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fastlora

VOCABULARY = 128
Use = Callable[[nn.Module, dict[str, torch.Tensor]], "torch.Tensor | tuple[torch.Tensor, Any]"]


class CustomCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        p = logits.float().softmax(-1)
        ctx.save_for_backward(p, labels)
        return -p.gather(-1, labels[:, None]).log().mean()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        p, labels = ctx.saved_tensors
        d = p.clone()
        d[torch.arange(len(labels)), labels] -= 1
        return g * d / len(labels), None


def entropy(logits: torch.Tensor) -> torch.Tensor:
    p = logits.log_softmax(-1)
    return (p.exp() * p).sum(-1).mean()


def metric_first(model: nn.Module, b: dict[str, torch.Tensor]) -> Any:
    out = model(**b)
    with torch.no_grad():
        right = (out.logits.argmax(-1) == b["labels"]).float().mean()
    return out.loss + 0.1 * entropy(out.logits), right


def metric_in_inference_mode(model: nn.Module, b: dict[str, torch.Tensor]) -> Any:
    out = model(**b)
    with torch.inference_mode():
        right = float((out.logits.argmax(-1) == b["labels"]).float().mean())
    return out.loss + 0.1 * entropy(out.logits), right


def own_function(model: nn.Module, b: dict[str, torch.Tensor]) -> Any:
    out = model(**b)
    return out.loss + CustomCrossEntropy.apply(out.logits[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten())


def hooks(model: nn.Module, b: dict[str, torch.Tensor]) -> Any:
    out, seen = model(**b), []
    out.logits.retain_grad()
    out.logits.register_hook(lambda g: seen.append(g.clone()) or g * 2)
    return out.loss, (seen, lambda: out.logits.grad + 0)


def gradient_for_logits(model: nn.Module, b: dict[str, torch.Tensor]) -> Any:
    out = model(**b)
    (gradient,) = torch.autograd.grad(out.loss, out.logits, retain_graph=True)
    return out.loss, gradient.norm()


def reentrant_checkpoint(model: nn.Module, b: dict[str, torch.Tensor]) -> Any:
    logits = model(input_ids=b["input_ids"]).logits
    return torch.utils.checkpoint.checkpoint(
        lambda z: F.cross_entropy(z.view(-1, VOCABULARY), b["labels"].view(-1)), logits, use_reentrant=True
    )


def written_by_a_function(model: nn.Module, b: dict[str, torch.Tensor]) -> Any:
    logits = model(input_ids=b["input_ids"]).logits
    view = logits.view(-1, VOCABULARY)
    F.hardtanh(logits, -0.1, 0.1, inplace=True)
    return F.cross_entropy(view, b["labels"].view(-1))


def written_through_data(model: nn.Module, b: dict[str, torch.Tensor]) -> Any:
    logits = model(input_ids=b["input_ids"]).logits
    view, copied = logits.view(-1, VOCABULARY), logits.double()
    logits.data.clamp_(-0.1, 0.1)
    return F.cross_entropy(view, b["labels"].view(-1)) + copied.square().mean()


USES: dict[str, Use] = {
    use.__name__: use
    for use in (
        metric_first, metric_in_inference_mode, own_function, hooks, gradient_for_logits, reentrant_checkpoint,
        written_by_a_function, written_through_data,
    )
}  # fmt: skip
FUSED_OUTSIDE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "flattened and widened": lambda z, y: F.cross_entropy(z[:, :-1].flatten(0, 1).float(), y[:, 1:].flatten()),
    "labelled rows": lambda z, y: F.cross_entropy(z[y > 20], y[y > 20]),
    "chunks": lambda z, y: sum(
        F.cross_entropy(a.flatten(0, 1), b.flatten()) for a, b in zip(z.chunk(2, 1), y.chunk(2, 1), strict=True)
    ),
    "sequence first": lambda z, y: F.cross_entropy(z.transpose(0, 1).reshape(-1, VOCABULARY), y.t().reshape(-1)),
    "one sequence": lambda z, y: F.cross_entropy(z[0], y[0]),
    "bytes": lambda z, y: F.cross_entropy(z.view(-1, VOCABULARY), y.view(-1).to(torch.uint8)),
    "by keyword": lambda z, y: F.cross_entropy(input=z.view(size=(-1, VOCABULARY)), target=y.view(-1)),
}


def observe(model: nn.Module, use: Use) -> dict[str, Any]:
    """Return the loss, all gradients and the observations of a use."""
    model.zero_grad()
    torch.manual_seed(0)
    result = use(model, batch())
    loss, seen = result if isinstance(result, tuple) else (result, None)
    loss.backward()
    if isinstance(seen, tuple):
        seen = [*seen[0], seen[1]()]
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach(), "seen": seen}


def assert_alike(found: Any, expected: Any, name: str = "") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_alike(found[key], expected[key], key)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for mine, its in zip(found, expected, strict=True):
            assert_alike(mine, its, name)
    elif isinstance(expected, torch.Tensor):
        assert relative(found + 0, expected) <= 1e-5, name
    else:
        assert found == expected, name


def in_place(model: nn.Module) -> nn.Module:
    return fastlora.compile(model)


def traced_whole(model: nn.Module) -> Any:
    return torch.compile(model, backend="fastlora")


@pytest.mark.parametrize("name", USES)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain head", "adapted head"])
def test_uses_of_logits_equal_eager(name: str, adapted: bool) -> None:
    targets = {"target_modules": ["q_proj", "lm_head"]} if adapted else {}
    expected = observe(build("llama", **targets), USES[name])
    assert_alike(observe(in_place(build("llama", **targets)), USES[name]), expected)


@pytest.mark.parametrize("name", ["metric_first", "own_function", "hooks", "written_by_a_function"])
def test_logits_of_a_fully_traced_model_equal_eager(name: str) -> None:
    torch.compiler.reset()
    model = build("llama")
    expected = observe(model, USES[name])
    compiled = traced_whole(model)

    def use(_: nn.Module, b: dict[str, torch.Tensor]) -> Any:
        return USES[name](lambda **kwargs: compiled(**kwargs, use_cache=False), b)  # type: ignore[arg-type]

    assert_alike(observe(model, use), expected)


@pytest.mark.parametrize("name", FUSED_OUTSIDE)
def test_losses_outside_of_the_model_are_fused(name: str) -> None:
    def use(model: nn.Module, b: dict[str, torch.Tensor]) -> torch.Tensor:
        return FUSED_OUTSIDE[name](model(input_ids=b["input_ids"]).logits, b["labels"])

    expected = observe(build("llama"), use)
    model = in_place(build("llama"))
    assert_alike(observe(model, use), expected)
    report = fastlora.report(model)
    assert report.coverage["loss"].fused == 1
    assert not [note for note in report.notes if "materialized" in note]


@pytest.mark.parametrize("count", [0, 7])
def test_a_batch_without_labels_gives_zero_gradients(count: int) -> None:
    def use(model: nn.Module, b: dict[str, torch.Tensor]) -> torch.Tensor:
        b["labels"][:] = -100
        return model(**b, num_items_in_batch=torch.tensor(count)).loss

    model = in_place(build("llama"))
    model.zero_grad()
    use(model, batch()).backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert not any(g.any() for g in gradients)


@contextmanager
def process_group() -> Iterator[None]:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("options", [{"find_unused_parameters": True}, {"static_graph": True}, {}], ids=str)
@pytest.mark.parametrize("outside", [False, True], ids=["wrapped after", "wrapped before"])
def test_losses_outside_a_ddp_model_equal_eager(options: dict[str, bool], outside: bool) -> None:
    def use(model: nn.Module, b: dict[str, torch.Tensor]) -> torch.Tensor:
        out = model(**b)
        return out.loss + 0.5 * entropy(out.logits)

    with process_group():
        expected = observe(DistributedDataParallel(build("llama"), **options), use)
        model = build("llama")
        if outside:
            found = observe(in_place(DistributedDataParallel(model, **options)), use)
        else:
            found = observe(DistributedDataParallel(in_place(model), **options), use)
        assert_alike(found, expected)
        coverage = fastlora.report(model).coverage
        assert coverage["lora"].fused == coverage["lora"].seen == 21


@pytest.mark.parametrize("inside", [True, False], ids=["own loss", "loss outside"])
@pytest.mark.parametrize("head_apart", [False, True])
@pytest.mark.parametrize("reshard", [False, True])
def test_the_weight_of_a_sharded_head_may_be_freed(reshard: bool, head_apart: bool, inside: bool) -> None:
    def use(model: nn.Module, b: dict[str, torch.Tensor]) -> torch.Tensor:
        if inside:
            return model(**b).loss
        logits = model(input_ids=b["input_ids"]).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), b["labels"][:, 1:].flatten())

    def sharded() -> Any:
        model: Any = build("llama")
        inner = model.base_model.model
        parts = [*inner.model.layers, *([inner.lm_head] if head_apart else []), model]
        mesh = init_device_mesh("cpu", (1,))
        for part in parts:
            fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
        return model

    def whole(found: dict[str, Any]) -> dict[str, Any]:
        return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in found.items()}

    with process_group():
        expected = whole(observe(sharded(), use))
        model = in_place(sharded())
        for _ in range(2):
            assert_alike(whole(observe(model, use)), expected)
        coverage = fastlora.report(model).coverage["loss"]
        assert (coverage.seen, coverage.fused) == (1, not head_apart and (inside or not reshard))
