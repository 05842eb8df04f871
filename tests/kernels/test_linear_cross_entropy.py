from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_checks import (
    CONTRACT,
    DEVICE,
    Arguments,
    Case,
    backward_calls,
    bf16,
    complete,
    evaluate,
    f16,
    f32,
    f64,
    native,
    replaced,
    saved_for_backward,
)
from op_precision import (
    assert_as_precise,
    assert_derived,
    assert_precise_on_average,
    assert_propagates,
    at,
    gradient,
    random_point,
    sizes,
    symbols,
    tensors,
    value,
)

from fastlora.kernels import linear_cross_entropy as module
from fastlora.kernels.forms import restriction
from fastlora.kernels.ops import linear_cross_entropy
from fastlora.tools.bench.accuracy import in_float64

FORMS = ["pytorch", "triton"]

PLAIN = {
    "scale": 1.0,
    "softcap": 0.0,
    "ignore_index": -100,
    "reduction": "mean",
    "label_smoothing": 0.0,
    "z_loss": 0.0,
}


def arguments(
    dtype: torch.dtype,
    tokens: int,
    hidden: int,
    vocabulary: int,
    bias: bool = False,
    rank: int = 0,
    ignores: bool = True,
    **others: Any,
) -> Arguments:
    """Logits of the size that a trained model has, in float32 or wider; every third label is ignored."""
    labels = torch.randint(0, vocabulary, (tokens,))
    if ignores:
        labels[::3] = others.get("ignore_index", -100)
    given_ = {
        "x": torch.randn(tokens, hidden, dtype=f64).to(dtype),
        "weight": (3 * torch.randn(vocabulary, hidden, dtype=f64) * hidden**-0.5).to(dtype),
        "bias": torch.randn(vocabulary, dtype=f64).to(dtype) if bias else None,
        "labels": labels,
        "base_dtype": dtype,
        "logits_dtype": torch.promote_types(dtype, f32),
        **PLAIN,
    }
    if rank:
        given_ |= {
            "lora_a": (torch.randn(rank, hidden, dtype=f64) * hidden**-0.5).to(dtype),
            "lora_b": torch.randn(vocabulary, rank, dtype=f64).to(dtype),
            "scaling": 0.6,
            "lora_dtype": dtype,
        }
    return given_ | others


OPTIONS: dict[str, Arguments] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 0.3},
    "softcap and scale": {"softcap": 3.0, "scale": 0.7},
    "ignores a word": {"ignore_index": 2, "reduction": "none", "label_smoothing": 0.1, "z_loss": 0.1},
    "adapter": {"rank": 2},
    "adapter, each": {"rank": 2, "reduction": "none", "softcap": 3.0},
}
CASES = [
    *(Case(name, linear_cross_entropy, arguments, 7, 4, 5, bias=True, **options) for name, options in OPTIONS.items()),
    Case("no bias", linear_cross_entropy, arguments, 7, 4, 5),
]


def set_chunks(patch: pytest.MonkeyPatch, rows: int) -> None:
    patch.setattr(module, "chunk_rows", lambda *_: rows)


@pytest.fixture(params=[1000, 2], ids=["one chunk", "chunks"])
def _chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rows: seven tokens of which four are kept make two chunks, or four of which the last have none."""
    set_chunks(monkeypatch, request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("check", CONTRACT)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case, check: Any) -> None:
    check(case)


def precisions() -> st.SearchStrategy[tuple[torch.dtype, torch.dtype, torch.dtype, torch.dtype]]:
    """Dtypes of the tensors, the head, its adapter and the logits."""
    drawn = [
        (f32, f32, f32, f32),
        (f16, f16, f16, f32),
        (f16, f16, f32, f32),
        (f32, f16, f16, f32),
        (bf16, bf16, bf16, f32),
        (bf16, bf16, f32, f32),
        (f32, bf16, bf16, f32),
        (bf16, bf16, bf16, bf16),
    ]
    interpreted = restriction() == "triton" and DEVICE.type == "cpu"
    return st.sampled_from([dtypes for dtypes in drawn if not (interpreted and bf16 in dtypes)])


@given(st.data())
def test_errors_are_no_larger_than_eager_ones(data: st.DataObject) -> None:
    """Any loss, head and share of ignored labels, autocast or not, in chunks of any size."""
    tokens, hidden = data.draw(sizes), data.draw(sizes)
    vocabulary = data.draw(sizes.filter(lambda size: size > 1))  # one word has a constant loss
    dtype, base, low, logits = data.draw(precisions())
    ignore_index = data.draw(st.sampled_from([-100, 0, vocabulary]))
    labels = st.one_of(st.integers(0, vocabulary - 1), st.just(ignore_index))
    drawn = {
        "x": data.draw(tensors((tokens, hidden), dtype)),
        "weight": data.draw(tensors((vocabulary, hidden), dtype)),
        "bias": data.draw(tensors((vocabulary,), dtype)) if data.draw(st.booleans()) else None,
        "labels": torch.tensor(data.draw(st.lists(labels, min_size=tokens, max_size=tokens))),
        "scale": data.draw(st.sampled_from([1.0, 0.125])),
        "softcap": data.draw(st.sampled_from([0.0, 30.0])),
        "ignore_index": ignore_index,
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1])),
        "z_loss": data.draw(st.sampled_from([0.0, 1e-3])),
        "base_dtype": base,
        "logits_dtype": logits,
    }
    if data.draw(st.booleans()):
        rank = data.draw(st.sampled_from([1, 3]))
        drawn |= {
            "lora_a": data.draw(tensors((rank, hidden), low, 0.3)),
            "lora_b": data.draw(tensors((vocabulary, rank), low, 0.3)),
            "scaling": data.draw(st.sampled_from([1.0, 2.5])),
            "lora_dtype": low,
        }
    with pytest.MonkeyPatch.context() as patch:
        set_chunks(patch, data.draw(st.sampled_from([1, 3, 1000])))
        assert_as_precise(linear_cross_entropy, complete(linear_cross_entropy, drawn))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_every_combination_of_options(reduction: str, ignored: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soft-cap, smoothing, z-loss and bias, alone and together, and labels that are ignored or not."""
    set_chunks(monkeypatch, 3)
    for softcap, smoothing, z_loss, bias in itertools.product((0.0, 2.0), (0.0, 0.2), (0.0, 0.05), (False, True)):
        options = {"softcap": softcap, "label_smoothing": smoothing, "z_loss": z_loss, "reduction": reduction}
        torch.manual_seed(0)
        given_ = arguments(native(), 7, 4, 5, bias=bias, ignores=ignored == "some", **options)
        if ignored == "all":
            given_["labels"].fill_(-100)
        given_ = complete(linear_cross_entropy, given_)
        if native() is f64:
            result, expected = (evaluate(f, given_) for f in (linear_cross_entropy, linear_cross_entropy.reference))
            torch.testing.assert_close(result.values(), expected.values(), equal_nan=True, rtol=1e-10, atol=1e-12)
        else:
            assert_as_precise(linear_cross_entropy, given_)


DTYPES = [(f32, f32), (bf16, bf16), (f16, f16), (f32, bf16), (f32, f16)]
EVERYTHING: Arguments = {"softcap": 3.0, "scale": 0.7, "label_smoothing": 0.1, "z_loss": 0.1, "rank": 2}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("dtype", "base"), DTYPES)
def test_errors_on_average(
    dtype: torch.dtype, base: torch.dtype, options: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    set_chunks(monkeypatch, 40)
    given_ = arguments(dtype, 128, 24, 31, **options | {"reduction": "none"}, bias=True) | {"base_dtype": base}
    assert_precise_on_average(linear_cross_entropy, complete(linear_cross_entropy, given_))


@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("dtype", "base"), DTYPES)
def test_errors_on_average_of_gradients_that_the_forward_makes(
    dtype: torch.dtype, base: torch.dtype, reduction: str, options: Arguments, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    set_chunks(monkeypatch, 20)
    given_ = arguments(dtype, 128, 24, 31, reduction=reduction, bias=True, **options) | {"base_dtype": base}
    assert_precise_on_average(linear_cross_entropy, complete(linear_cross_entropy, given_))


@pytest.mark.parametrize("base", [bf16, f16])
def test_errors_on_average_with_a_float32_adapter(base: torch.dtype) -> None:
    torch.manual_seed(0)
    given_ = arguments(base, 128, 24, 31, rank=4)
    given_ |= {n: given_[n].to(f32) + 1e-4 * torch.randn(given_[n].shape) for n in ("lora_a", "lora_b")}
    given_["lora_dtype"] = f32
    assert_precise_on_average(linear_cross_entropy, complete(linear_cross_entropy, given_))


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_errors_of_a_capped_model(scale: float) -> None:
    """Logits far below the cap, where tanh is almost its argument, and far above it, where it is almost 1."""
    torch.manual_seed(0)
    given_ = arguments(f32, 64, 16, 31, reduction="none", softcap=30.0, scale=scale)
    assert_precise_on_average(linear_cross_entropy, complete(linear_cross_entropy, given_))


def test_errors_of_a_sure_model() -> None:
    """Large logits and tiny losses: lse as one float32 number would cost the gradient its leading digits."""
    torch.manual_seed(0)
    given_ = complete(linear_cross_entropy, arguments(f32, 64, 16, 31, reduction="none"))
    given_["weight"] *= 5
    given_["labels"] = (given_["x"] @ given_["weight"].T).argmax(-1)
    assert_precise_on_average(linear_cross_entropy, given_)


@pytest.mark.parametrize("dtype", [f16, f32])
@pytest.mark.parametrize("confidence", [1.0, 4.0])
def test_a_loss_scale_of_65536_neither_overflows_nor_underflows(dtype: torch.dtype, confidence: float) -> None:
    """As float16 training starts with."""
    torch.manual_seed(0)
    given_ = complete(linear_cross_entropy, arguments(dtype, 256, 16, 61, bias=True) | {"base_dtype": f16})
    given_["weight"] *= confidence
    scale = [torch.tensor(65536.0, device=DEVICE)]
    truth = evaluate(linear_cross_entropy.reference, in_float64(given_), grads=[scale[0].double()]).values()
    mine = evaluate(linear_cross_entropy, given_, grads=scale).values()
    eager = evaluate(linear_cross_entropy.reference, given_, grads=scale).values()
    for name, true in truth.items():
        errors = [(values[name].double() - true).square().mean().sqrt() for values in (mine, eager)]
        floor = torch.finfo(mine[name].dtype).eps * true.square().mean().sqrt()
        assert mine[name].isfinite().all()
        assert not eager[name].isfinite().all() or errors[0] <= 1.25 * errors[1] + floor


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_infs_and_nans_propagate(options: Arguments) -> None:
    given_ = arguments(f32, 4, 4, 5, bias=True, ignores=False, **options)
    given_["labels"] = torch.tensor([0, 4, 1, 3])
    assert_propagates(linear_cross_entropy, complete(linear_cross_entropy, given_))


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_ignored_tokens_hold_does_not_matter(options: Arguments, bad: float) -> None:
    torch.manual_seed(0)
    given_ = complete(linear_cross_entropy, arguments(f32, 7, 4, 5, bias=True, **options))
    ignored = given_["labels"] == given_["ignore_index"]
    spoiled = replaced(given_, {"x": given_["x"].masked_fill(ignored[:, None], bad)})
    result, expected = (evaluate(linear_cross_entropy, g).values() for g in (spoiled, given_))
    for name, found in result.items():
        assert found.isfinite().all(), name
        assert torch.equal(found, expected[name]), name
    assert not result["gradient of x"][ignored].any()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("tokens", [0, 4], ids=["no tokens", "all ignored"])
def test_nothing_to_learn_from(tokens: int, reduction: str) -> None:
    if tokens == 0 and restriction() == "triton":
        pytest.skip("a kernel needs a token")
    given_ = arguments(f32, tokens, 4, 5, bias=True, rank=2, reduction=reduction)
    given_ = complete(linear_cross_entropy, given_ | {"labels": torch.full((tokens,), -100)})
    result, expected = (evaluate(f, given_) for f in (linear_cross_entropy, linear_cross_entropy.reference))
    torch.testing.assert_close(result.values(), expected.values(), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [5, -1, 2**40])
def test_label_out_of_range(bad: int) -> None:
    if DEVICE.type == "cuda":
        pytest.skip("a GPU that has met a failed assertion is of no use to later tests")
    given_ = arguments(f32, 7, 4, 5)
    given_["labels"][4] = bad
    with pytest.raises(IndexError, match="out of bounds"):
        linear_cross_entropy(**given_)


def test_unknown_reduction() -> None:
    with pytest.raises(ValueError, match="'max' is none of mean, sum, none"):
        linear_cross_entropy(**complete(linear_cross_entropy, arguments(f32, 7, 4, 5, reduction="max")))


def test_labels_for_other_tokens() -> None:
    given_ = complete(linear_cross_entropy, arguments(f32, 7, 4, 5))
    with pytest.raises(ValueError, match=r"6 labels for x of shape \(7, 4\)"):
        linear_cross_entropy(**given_ | {"labels": given_["labels"][:6]})


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_tokens_may_have_several_dimensions(reduction: str) -> None:
    """x (B, S, H) with labels (B, S): the same loss, and a gradient of x's shape."""
    given_ = complete(linear_cross_entropy, arguments(native(), 6, 4, 5, reduction=reduction))
    shaped = given_ | {"x": given_["x"].reshape(2, 3, 4), "labels": given_["labels"].reshape(2, 3)}
    result, expected = evaluate(linear_cross_entropy, shaped), evaluate(linear_cross_entropy, given_)
    assert torch.equal(result.outputs[0], expected.outputs[0])
    assert result.gradient("x").shape == (2, 3, 4)
    assert torch.equal(result.gradient("x").reshape(6, 4), expected.gradient("x"))


# ---- what is computed, and what is kept


def test_products_may_stop_at_the_count_of_kept_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reads what a product of rows leaves unwritten, and no sum over rows goes beyond them."""
    if restriction() != "triton":
        pytest.skip("the PyTorch form has no such products")
    from fastlora.kernels.gpu import linear_cross_entropy as gpu

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
def test_the_host_never_waits_and_a_graph_can_be_captured(options: Arguments) -> None:
    given_ = complete(linear_cross_entropy, arguments(f32, 7, 4, 5, bias=True, **options))
    names = [name for name in ("x", "weight", "bias", "lora_a", "lora_b") if given_[name] is not None]
    inputs = [given_[name].requires_grad_() for name in names]

    def run() -> list[torch.Tensor]:
        loss = linear_cross_entropy(**given_)
        return [loss, *torch.autograd.grad(loss.sum(), inputs)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # not the default one, which a captured backward may not wait for
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
    if restriction() == "triton" and DEVICE.type == "cuda":
        pytest.skip("products may be kernels of our own")


def products(function: Callable[[], Any]) -> list[list[int]]:
    """The shapes of the operands of every matrix product."""
    with torch.profiler.profile(record_shapes=True) as profile:
        function()
    found = [
        e for e in profile.events() if e.name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::_addmm_activation")
    ]
    return [[n for shape in event.input_shapes if len(shape) == 2 for n in shape] for event in found]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_tokens_never_enter_a_product(reduction: str) -> None:
    if restriction() == "triton" or DEVICE.type == "cuda":
        pytest.skip("a GPU multiplies zeros in their place, unless its products stop at a count")
    given_ = complete(linear_cross_entropy, arguments(f32, 97, 4, 5, bias=True, rank=2, reduction=reduction))
    given_["labels"][13:] = -100
    kept = int((given_["labels"] != -100).sum())
    shapes = products(lambda: evaluate(linear_cross_entropy, given_))
    assert all(97 not in shape for shape in shapes)
    assert all(kept in shape for shape in shapes)


def test_only_the_loss_is_computed_unless_gradients_are_wanted() -> None:
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
def test_no_product_is_made_twice_without_need(
    reduction: str, trained: tuple[str, ...], forward: int, backward: int
) -> None:
    _products_are_pytorchs()
    given_ = complete(linear_cross_entropy, arguments(f32, 7, 4, 5, reduction=reduction))
    wanted = [given_[name].requires_grad_() for name in trained]
    losses: list[torch.Tensor] = []
    assert len(products(lambda: losses.append(linear_cross_entropy(**given_).sum()))) == forward
    assert len(products(lambda: torch.autograd.grad(losses[0], wanted))) == backward


def test_a_frozen_head_saves_one_gradient_and_a_count() -> None:
    given_ = complete(linear_cross_entropy, arguments(f32, 7, 4, 5, bias=True, rank=2))
    with saved_for_backward() as saved:
        linear_cross_entropy(**given_ | {"x": given_["x"].clone().requires_grad_()})
    assert sorted(t.numel() for t in saved) == [0, 0, 0, 0, 1, 28]


def test_a_second_backward_writes_to_nothing_that_was_saved() -> None:
    """And gives equal bits, in float16 too, where what is saved carries a factor."""
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
def test_the_last_backward_makes_gradients_of_what_was_saved(reduction: str, incoming: float) -> None:
    """In its memory: beside a head's gradient there is no room for a second one."""
    given_ = complete(linear_cross_entropy, arguments(f32, 7, 4, 5, reduction=reduction))
    inputs = [given_[name].requires_grad_() for name in ("x", "weight")]
    with saved_for_backward() as saved:
        loss = linear_cross_entropy(**given_)
    g = torch.full_like(loss, incoming)
    kept = torch.autograd.grad(loss, inputs, g, retain_graph=True)
    made = {t.data_ptr() for t in saved if t.numel()}
    assert not any(t.data_ptr() in made for t in kept)
    last = torch.autograd.grad(loss, inputs, g)
    assert all(torch.equal(a, b) for a, b in zip(kept, last, strict=True))
    if restriction() == "triton":
        assert last[0].data_ptr() in made
        assert (last[1].data_ptr() in made) == (reduction == "mean")


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs the allocator of a GPU")
def test_no_second_gradient_of_the_head_is_held() -> None:
    if restriction() != "triton":
        pytest.skip("the PyTorch form multiplies into new memory")
    given_ = complete(linear_cross_entropy, arguments(bf16, 64, 1024, 20000, ignores=False))
    weight = given_["weight"].requires_grad_()
    loss = linear_cross_entropy(**given_)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss.backward()
    assert weight.grad is not None
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes / 2


def test_chunks_cover_the_tokens_within_the_budget() -> None:
    rows = module.chunk_rows(128256, 4, 64 << 20)
    covered = [i for chunk in module.chunks(1000, rows) for i in range(chunk.start, chunk.stop)]
    assert covered == list(range(1000))
    assert 4 * 128256 * rows <= 64 << 20 < 4 * 128256 * (rows + 1)
    assert module.chunk_rows(1 << 40, 4, 64 << 20) == 1


@pytest.mark.parametrize(("T", "vocabulary", "hidden", "trained", "rows"), [
    (8192, 128256, 4096, False, 2048),  # 16 x 16 tiles on 132 processors are two full waves, 18 x 16 are a third
    (8192, 256000, 3584, False, 1024),
    (8192, 256000, 3584, True, 1792),  # 14 x 28 smaller tiles are 2.97 waves
    (300, 128256, 4096, False, 300),
    (8192, 128256 << 12, 4096, False, 1),
])  # fmt: skip
def test_chunks_on_a_gpu_fill_it(
    T: int, vocabulary: int, hidden: int, trained: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastlora.kernels.gpu import linear_cross_entropy as gpu

    monkeypatch.setattr(gpu.matmul, "processors", lambda _: 132)
    held = vocabulary * hidden * 2 if trained else 0
    assert gpu.chunk_rows(T, vocabulary * 2, hidden, held, torch.device("cpu")) == rows


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize(("dtype", "base"), [(f32, bf16), (f32, f16), (f32, f32)])
def test_chunks_change_nothing_but_the_order_of_float32_sums(
    dtype: torch.dtype, base: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision too: what a chunk adds to the weight's gradient is not rounded first."""
    torch.manual_seed(0)
    given_ = complete(linear_cross_entropy, arguments(dtype, 64, 16, 31, bias=True) | {"base_dtype": base})
    whole = evaluate(linear_cross_entropy, given_).values()
    set_chunks(monkeypatch, rows)
    torch.testing.assert_close(evaluate(linear_cross_entropy, given_).values(), whole, rtol=1e-5, atol=1e-7)


def test_no_tensor_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, where a chunk is a tenth of the tokens."""
    if DEVICE.type == "cuda":
        pytest.skip("the profiler of CPU memory")
    tokens, hidden, vocabulary = 400, 3, 512
    set_chunks(monkeypatch, tokens // 10)
    given_ = arguments(f32, tokens, hidden, vocabulary, bias=True)
    if restriction() == "triton":
        given_["labels"][5:] = -100  # the interpreter takes its time
    with torch.profiler.profile(profile_memory=True) as profile:
        evaluate(linear_cross_entropy, complete(linear_cross_entropy, given_))
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 4 * vocabulary * tokens // 10


@pytest.mark.parametrize("z_loss", [0.0, 0.125])
@pytest.mark.parametrize(("softcap", "smoothing"), [(0.0, 0.0), (2.0, 0.0), (2.0, 0.25), (0.0, 0.25)])
def test_loss_and_gradient_of_the_logits_are_sympys(softcap: float, smoothing: float, z_loss: float) -> None:
    """A row of the head's output against the textbook's loss."""
    logits, (g,) = symbols("l", 4), symbols("g", 1)
    label, scale = 1, 0.75
    z = [s * sympy.Rational(scale) for s in logits]
    if softcap:
        z = [sympy.Rational(softcap) * sympy.tanh(s / sympy.Rational(softcap)) for s in z]
    lse = sympy.log(sum(map(sympy.exp, z)))
    log_p = [s - lse for s in z]
    e = sympy.Rational(smoothing)
    loss = -(1 - e) * log_p[label] - e * sum(log_p) / 4 + sympy.Rational(z_loss) * lse**2
    point = random_point(logits, [g])
    options = module.Loss(scale, softcap, -100, smoothing, z_loss)
    capped, t = module.cap(at(point, logits)[None], options)
    labels = torch.tensor([label])
    code, peak, log_sum = module.token_loss(capped, labels, options)
    assert_derived(code, torch.tensor([value(loss, point)], dtype=f64))
    derived = module.logits_gradient(capped, t, peak, log_sum, labels, at(point, [g]), options)
    assert_derived(derived[0], gradient(g * loss, logits, point))
