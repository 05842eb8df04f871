"""Properties of all rewritten graphs: side effects, checkpoints, copies, repeated runs and rewrites."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import analyse, evaluate, fresh, lora, randn, rms_norm, rotary, trace
from torch import Tensor, fx
from torch.utils.checkpoint import checkpoint

from fastlora.frontend.session import default_rules
from fastlora.lower.lowering import lower
from fastlora.rewrite.pipeline import rewrite

X, W = randn(2, 3, 16), randn(16)
LAYER = (randn(16, 16, grad=False), randn(4, 16), randn(16, 4))
GATE = (randn(24, 16, grad=False, seed=1), randn(4, 16, seed=1), randn(24, 4, seed=1))
UP = (randn(24, 16, grad=False, seed=2), randn(4, 16, seed=2), randn(24, 4, seed=2))
DOWN = (randn(16, 24, grad=False, seed=3), randn(4, 24, seed=3), randn(16, 4, seed=3))


def layer(x: Tensor, w: Tensor, *weights: Tensor, p: float = 0.0) -> Tensor:
    """A small transformer layer: norm, adapter, residual, norm, gated MLP."""
    x = x + lora(rms_norm(x, w), *weights[:3], p=p)
    h = rms_norm(x, w)
    gate, up = lora(h, *weights[3:6], p=p), lora(h, *weights[6:9], p=p)
    return x + lora(F.silu(gate) * up, *weights[9:], p=p)


MODEL = (X, W, *LAYER, *GATE, *UP, *DOWN)


def test_in_place_writes_without_users_are_kept() -> None:
    """FX's dead-code elimination would drop them, and change the loss."""

    def function(x: Tensor, w: Tensor, count: Tensor, log: Tensor) -> Any:
        y = rms_norm(x, w)
        z = y * 3.0
        z.add_(1)
        z.detach()[0] = 7.0
        count += 1
        log.copy_(z.detach())
        torch.mul(count, 2, out=count)
        F.relu(log, inplace=True)
        return z, count, log

    outcome = analyse(function, X, W, torch.zeros(3), torch.zeros(2, 3, 16))
    assert outcome.ops == ["rms_norm"]
    assert {"add_", "setitem", "iadd", "copy_", "relu"} <= set(outcome.targets())
    outcome.assert_close()


def test_a_write_to_an_input_that_nothing_reads_reaches_the_caller() -> None:
    def function(x: Tensor, w: Tensor, statistics: Tensor) -> Tensor:
        y = rms_norm(x, w)
        statistics.add_(y.detach().mean())
        return y

    def seen(run: Any) -> Tensor:
        given = fresh((X, W, torch.zeros(2)))
        run(*given)
        return given[2]

    torch._dynamo.reset()

    def backend(gm: fx.GraphModule, _: Any) -> Any:
        assert rewrite(gm, default_rules())[0].chosen
        return gm.forward

    torch.testing.assert_close(seen(torch.compile(function, backend=backend)), seen(function))
    assert seen(function).abs().sum() > 0


def test_a_graph_without_matches_is_not_touched() -> None:
    gm, _ = trace(lambda x, w: (x.float() * 1.0).contiguous() @ w, (X, randn(16, 3)))
    before, nodes = gm.code, list(gm.graph.nodes)
    rewrite(gm, default_rules())
    assert (gm.code, list(gm.graph.nodes)) == (before, nodes)


def test_a_whole_layer_is_fused_and_equals_eager() -> None:
    outcome = analyse(layer, *MODEL)
    assert outcome.ops == ["add_rms_norm", "lora_linear", "lora_mlp", "rms_norm"]
    assert not outcome.misses
    outcome.assert_tidy()
    outcome.assert_close(2e-6)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_checkpointed_layers_recompute_with_eagers_dropout_masks(p: float) -> None:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        for _ in range(2):
            x = checkpoint(lambda h, *ws: layer(h, *ws, p=p), x, *weights, use_reentrant=False)
        return x

    outcome = analyse(function, *MODEL)
    parts = ["lora_mlp"] if not p else ["glu", "lora_linear", "lora_linear", "lora_linear"]
    assert outcome.ops == sorted(2 * ["add_rms_norm", "lora_linear", "rms_norm", *parts])
    assert not outcome.misses
    outcome.assert_tidy()
    outcome.assert_close(3e-6)


def test_nested_checkpoints_are_rewritten() -> None:
    def inner(x: Tensor, w: Tensor) -> Tensor:
        return rms_norm(F.dropout(x, 0.4), w)

    def outer(x: Tensor, w: Tensor) -> Tensor:
        return checkpoint(inner, x, w, use_reentrant=False) + F.dropout(x, 0.2)

    outcome = analyse(lambda x, w: checkpoint(outer, x, w, use_reentrant=False) * 2, X, W)
    assert outcome.ops == ["rms_norm"]
    outcome.assert_close()


def test_each_run_of_a_graph_draws_new_masks() -> None:
    def function(x: Tensor, *weights: Tensor) -> Tensor:
        return checkpoint(lambda h, *ws: layer(h, *ws, p=0.3), x, *weights, use_reentrant=False)

    gm, given = trace(function, MODEL)
    rewrite(gm, default_rules())
    run = lower(gm, given, "eager", "default")
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    assert len(names) == len(MODEL)
    for seed in (0, 1):
        results = []
        for call in (lambda *args: run(*args)[0], function):
            own = fresh(given)
            torch.manual_seed(seed)
            y = call(*own)
            wanted = [t for t in own if t.requires_grad]
            results.append([y, *torch.autograd.grad(y.sum(), wanted)])
        for actual, expected in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


FUSED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "rms_norm": (rms_norm, (X, W)),
    "add_rms_norm": (lambda x, y, w: rms_norm(x + y, w), (X, randn(2, 3, 16, seed=1), W)),
    "layer_norm": (lambda x, w: F.layer_norm(x, (16,), w, w, 1e-5), (X, W)),
    "rotary": (rotary, (randn(2, 3, 4, 8), randn(4, 8), randn(4, 8, seed=1))),
    "glu": (lambda x, y: F.silu(x) * y, (X, randn(2, 3, 16, seed=1))),
    "lora_linear": (lora, (X, *LAYER)),
    "lora_group": (lambda x, *w: lora(x, *w[:3]) * lora(x, *w[3:]).sum(), (X, *GATE, *UP)),
    "lora_mlp": (lambda x, *w: lora(F.silu(lora(x, *w[:3])) * lora(x, *w[3:6]), *w[6:]), (X, *GATE, *UP, *DOWN)),
    "linear_cross_entropy": (
        lambda x, w, labels: F.cross_entropy(F.linear(x, w), labels),
        (randn(6, 16), randn(32, 16), torch.arange(6)),
    ),
}


@pytest.mark.parametrize("name", FUSED)
def test_a_second_derivative_raises(name: str) -> None:
    function, inputs = FUSED[name]
    gm, given = trace(function, inputs)
    (made,) = rewrite(gm, default_rules())
    assert name in [match.op.name for match in made.chosen]
    run = lower(gm, given, "eager", "default")
    own = fresh(given)
    y = run(*own)[0]
    wanted = [t for t in own if isinstance(t, Tensor) and t.requires_grad]
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(y.square().sum(), wanted, create_graph=True)


@pytest.mark.parametrize("name", FUSED)
def test_a_retained_graph_gives_equal_gradients(name: str) -> None:
    function, inputs = FUSED[name]
    gm, given = trace(function, inputs)
    rewrite(gm, default_rules())
    own = fresh(given)
    y = lower(gm, given, "eager", "default")(*own)[0].square().sum()
    wanted = [t for t in own if isinstance(t, Tensor) and t.requires_grad]
    first, second = (torch.autograd.grad(y, wanted, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _same_results(actual: Any, expected: Any, given: list[Any]) -> None:
    for a, b in zip(evaluate(actual, given).tensors(), evaluate(expected, given).tensors(), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.fixture(scope="module")
def rewritten() -> tuple[fx.GraphModule, list[Any]]:
    gm, given = trace(layer, MODEL)
    rewrite(gm, default_rules())
    return gm, given


def test_a_rewritten_module_can_be_copied(rewritten: tuple[fx.GraphModule, list[Any]]) -> None:
    gm, given = rewritten
    duplicate = copy.deepcopy(gm)
    assert duplicate.code == gm.code
    _same_results(duplicate, gm, given)


def test_a_rewritten_module_can_be_pickled(rewritten: tuple[fx.GraphModule, list[Any]]) -> None:
    gm, given = rewritten
    _same_results(pickle.loads(pickle.dumps(fx.GraphModule(gm, copy.deepcopy(gm.graph)))), gm, given)


def test_generated_code_can_be_executed_separately(rewritten: tuple[fx.GraphModule, list[Any]]) -> None:
    gm, given = rewritten
    python = gm.graph.python_code("self")
    scope = dict(python.globals)
    exec(python.src, scope)
    _same_results(lambda *args: scope["forward"](gm, *args), gm, given)


def test_a_rewritten_module_can_be_traced_again(rewritten: tuple[fx.GraphModule, list[Any]]) -> None:
    gm, given = rewritten
    again = fx.symbolic_trace(gm)
    again.graph.lint()
    _same_results(again, gm, given)


def test_a_rewritten_module_has_metadata_on_every_value(rewritten: tuple[fx.GraphModule, list[Any]]) -> None:
    """Later passes, printers and Inductor read shapes from it."""
    gm, _ = rewritten
    (output,) = (node for node in gm.graph.nodes if node.op == "output")
    for node in output.all_input_nodes:
        assert isinstance(node.meta["example_value"], Tensor)
        assert node.meta["example_value"].requires_grad


def test_rewriting_twice_finds_nothing_more(rewritten: tuple[fx.GraphModule, list[Any]]) -> None:
    gm, _ = rewritten
    before = gm.code
    assert not any(made.chosen for made in rewrite(gm, default_rules()))
    assert gm.code == before


def test_the_order_of_rules_does_not_matter() -> None:
    codes = set()
    for rules in (default_rules(), default_rules()[::-1]):
        gm, _ = trace(layer, MODEL)
        rewrite(gm, rules)
        codes.add(gm.code)
    assert len(codes) == 1
