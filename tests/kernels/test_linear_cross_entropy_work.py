"""Linear head + cross-entropy: no unneeded products, memory or synchronization; chunk sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_cases import OPTIONS, arguments, set_chunks
from op_cases import DEVICE, Arguments, bf16, complete, evaluate, f16, f32
from op_spies import backward_calls, saved_for_backward

from fastlora.kernels.core.call_site import call_site
from fastlora.kernels.core.implementations import restricted
from fastlora.kernels.formulas import linear_cross_entropy as module
from fastlora.kernels.ops import linear_cross_entropy
from fastlora.tools.bench.accuracy import flat

IMPLEMENTATIONS = ["pytorch", "triton"]


def test_rows_beyond_the_kept_tokens_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that `rows_product` does not write are not read, and sums over rows stop at the kept ones."""
    if restricted.to != "triton":
        pytest.skip("the PyTorch implementation has no such products")
    from fastlora.kernels.triton import linear_cross_entropy as gpu

    def rows_product(left: torch.Tensor, right: torch.Tensor, remaining: torch.Tensor, out: torch.Tensor) -> None:
        out.fill_(math.nan)[:remaining] = left[:remaining] @ right

    def depth_product(
        total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, remaining: torch.Tensor, beta: float
    ) -> None:
        total.addmm_(left[:remaining].t(), right[:remaining], beta=beta)

    for (name, options), chunk in itertools.product(OPTIONS.items(), (2, 1000)):
        set_chunks(monkeypatch, chunk)
        torch.manual_seed(0)
        given_ = complete(linear_cross_entropy, arguments(f32, 7, 4, 5, **options))
        expected = evaluate(linear_cross_entropy, given_).values()
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "rows_product", rows_product)
            patch.setattr(gpu, "depth_product", depth_product)
            found = evaluate(linear_cross_entropy, given_).values()
        torch.testing.assert_close(found, expected, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_synchronization_so_a_cuda_graph_can_be_captured(options: Arguments) -> None:
    given_ = complete(linear_cross_entropy, arguments(f32, 7, 4, 5, bias=True, **options))
    names = [name for name in ("x", "weight", "bias", "lora_a", "lora_b") if given_[name] is not None]
    inputs = [given_[name].requires_grad_() for name in names]

    def run() -> list[torch.Tensor]:
        loss = linear_cross_entropy(**given_)
        return [loss, *torch.autograd.grad(loss.sum(), inputs)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # not the default stream, on which a captured backward must not synchronize
        expected = run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = run()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def _products_are_pytorchs() -> None:
    if restricted.to == "triton" and DEVICE.type == "cuda":
        pytest.skip("products may be custom kernels")


def products(function: Callable[[], Any]) -> list[list[int]]:
    """Return the shapes of the operands of every matrix product."""
    with torch.profiler.profile(record_shapes=True) as profile:
        function()
    found = [
        e for e in profile.events() if e.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::_addmm_activation")
    ]
    return [[n for shape in event.input_shapes if len(shape) == 2 for n in shape] for event in found]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_tokens_take_part_in_no_product(reduction: str) -> None:
    if restricted.to == "triton" or DEVICE.type == "cuda":
        pytest.skip("a GPU multiplies zeros instead, unless its products stop at a count")
    given_ = complete(linear_cross_entropy, arguments(f32, 97, 4, 5, bias=True, rank=2, reduction=reduction))
    given_["labels"][13:] = -100
    kept = int((given_["labels"] != -100).sum())
    shapes = products(lambda: evaluate(linear_cross_entropy, given_))
    assert all(97 not in shape for shape in shapes)
    assert all(kept in shape for shape in shapes)


def test_without_gradients_only_the_loss_is_computed() -> None:
    _products_are_pytorchs()
    given_ = complete(linear_cross_entropy, arguments(f32, 7, 4, 5))
    x = given_["x"].clone().requires_grad_()
    with torch.no_grad():
        assert len(products(lambda: linear_cross_entropy(**given_ | {"x": x}))) == 1
    assert len(products(lambda: linear_cross_entropy(**given_))) == 1
    assert len(products(lambda: linear_cross_entropy(**given_ | {"x": x}))) == 2


@pytest.mark.parametrize(("reduction", "trained", "forward", "backward"), [
    ("mean", ("x",), 2, 0),
    ("mean", ("weight",), 2, 0),
    ("sum", ("x", "weight"), 3, 0),
    ("none", ("x",), 2, 0),
    ("none", ("weight",), 1, 2),
    ("none", ("x", "weight"), 2, 2),
])  # fmt: skip
def test_no_product_is_computed_twice_unnecessarily(
    reduction: str, trained: tuple[str, ...], forward: int, backward: int
) -> None:
    _products_are_pytorchs()
    given_ = complete(linear_cross_entropy, arguments(f32, 7, 4, 5, reduction=reduction))
    wanted = [given_[name].requires_grad_() for name in trained]
    losses: list[torch.Tensor] = []
    assert len(products(lambda: losses.append(linear_cross_entropy(**given_).sum()))) == forward
    assert len(products(lambda: torch.autograd.grad(losses[0], wanted))) == backward


def test_a_frozen_head_saves_dx_labels_and_the_count() -> None:
    given_ = complete(linear_cross_entropy, arguments(f32, 7, 4, 5, bias=True, rank=2))
    with saved_for_backward() as saved:
        linear_cross_entropy(**given_ | {"x": given_["x"].clone().requires_grad_()})
    assert sorted(t.numel() for t in saved) == [0, 0, 0, 0, 1, 7, 28]


def test_a_retained_graph_does_not_overwrite_saved_gradients() -> None:
    """And gives equal bits, also in float16, where saved gradients are scaled."""
    given_ = complete(linear_cross_entropy, arguments(f16, 7, 4, 5, bias=True))
    names = ("x", "weight", "bias")
    inputs = [given_[name].requires_grad_() for name in names]
    with backward_calls(linear_cross_entropy) as calls:
        loss = linear_cross_entropy(**given_)
        first = torch.autograd.grad(loss, inputs, retain_graph=True)
        made = [t.clone() for t in calls[0][2:] if isinstance(t, torch.Tensor)]
        second = torch.autograd.grad(loss, inputs, retain_graph=True)
        again = [t for t in calls[1][2:] if isinstance(t, torch.Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(made, again, strict=True))
        last = torch.autograd.grad(loss, inputs)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, last, strict=True))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("incoming", [1.0, 0.3])
def test_the_last_backward_reuses_the_memory_of_saved_gradients(reduction: str, incoming: float) -> None:
    """In calls from compiled graphs, since the head's gradient is too large to exist twice."""
    given_ = complete(linear_cross_entropy, arguments(f32, 7, 4, 5, reduction=reduction))
    inputs = [given_[name].requires_grad_() for name in ("x", "weight")]
    site, tensors = call_site(linear_cross_entropy, linear_cross_entropy.order(given_)[: len(given_)])
    (loss,) = flat(site(*tensors))
    saved = loss.grad_fn.saved_tensors  # type: ignore[union-attr]
    g = torch.full_like(loss, incoming)
    kept = torch.autograd.grad(loss, inputs, g, retain_graph=True)
    made = {t.data_ptr() for t in saved if t.numel()}
    assert not any(t.data_ptr() in made for t in kept)
    last = torch.autograd.grad(loss, inputs, g)
    assert all(torch.equal(a, b) for a, b in zip(kept, last, strict=True))
    if restricted.to == "triton":
        assert last[0].data_ptr() in made
        assert (last[1].data_ptr() in made) == (reduction == "mean")


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs the allocator of a GPU")
def test_the_heads_gradient_exists_only_once() -> None:
    if restricted.to != "triton":
        pytest.skip("the PyTorch implementation multiplies into new memory")
    given_ = complete(linear_cross_entropy, arguments(bf16, 64, 1024, 20000, ignores=False))
    weight = given_["weight"].requires_grad_()
    site, tensors = call_site(linear_cross_entropy, linear_cross_entropy.order(given_)[: len(given_)])
    (loss,) = flat(site(*tensors))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss.backward()
    assert weight.grad is not None
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes / 2


def test_chunks_cover_all_tokens_within_the_budget() -> None:
    rows = module.chunk_rows(128256, 4, 64 << 20)
    covered = [i for chunk in module.chunks(1000, rows) for i in range(chunk.start, chunk.stop)]
    assert covered == list(range(1000))
    assert 4 * 128256 * rows <= 64 << 20 < 4 * 128256 * (rows + 1)
    assert module.chunk_rows(1 << 40, 4, 64 << 20) == 1


@pytest.mark.parametrize(("T", "vocabulary", "hidden", "trained", "rows"), [
    (8192, 128256, 4096, False, 1024),  # 8 x 16 tiles on 132 processors are a full wave
    (8192, 128256, 4096, True, 2048),
    (8192, 152064, 3584, True, 1792),  # 14 x 14 are one and a half, which halved sums fill
    (300, 128256, 4096, False, 300),
    (8192, 128256 << 12, 4096, False, 1),
])  # fmt: skip
def test_chunk_sizes_fill_the_gpu(
    T: int, vocabulary: int, hidden: int, trained: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastlora.kernels.triton import linear_cross_entropy as gpu

    monkeypatch.setattr(gpu.split_k, "processors", lambda _: 132)
    held = vocabulary * hidden * 2 if trained else 0
    assert gpu.chunk_rows(T, vocabulary * 2, vocabulary, hidden, held, torch.device("cpu")) == rows


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize(("dtype", "base"), [(f32, bf16), (f32, f16), (f32, f32)])
def test_chunking_changes_only_the_order_of_float32_sums(
    dtype: torch.dtype, base: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in half precision: a chunk's contribution to the weight's gradient is not rounded first."""
    torch.manual_seed(0)
    given_ = complete(linear_cross_entropy, arguments(dtype, 64, 16, 31, bias=True) | {"base_dtype": base})
    whole = evaluate(linear_cross_entropy, given_).values()
    set_chunks(monkeypatch, rows)
    torch.testing.assert_close(evaluate(linear_cross_entropy, given_).values(), whole, rtol=1e-5, atol=1e-7)


def test_no_tensor_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward and backward, with chunks of a tenth of the tokens."""
    if DEVICE.type == "cuda":
        pytest.skip("uses the profiler of CPU memory")
    tokens, hidden, vocabulary = 400, 3, 512
    set_chunks(monkeypatch, tokens // 10)
    given_ = arguments(f32, tokens, hidden, vocabulary, bias=True)
    if restricted.to == "triton":
        given_["labels"][5:] = -100  # the interpreter is slow
    with torch.profiler.profile(profile_memory=True) as profile:
        evaluate(linear_cross_entropy, complete(linear_cross_entropy, given_))
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 4 * vocabulary * tokens // 10
