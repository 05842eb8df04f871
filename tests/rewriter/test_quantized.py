"""Products of 4-bit weights are read as linear layers during matching, and restored if no rule fuses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import called
from quantized_models import Format
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from fastlora.frontend.session import default_rules
from fastlora.graph.bodies import bodies
from fastlora.graph.fake_values import static_input_indices
from fastlora.kernels.ops import dequantize_4bit, lora_linear
from fastlora.lower import rematerialize
from fastlora.lower.lowering import lower
from fastlora.rewrite.pipeline import rewrite
from fastlora.rewrite.quantized import propose, restore

WIDTH, RANK = 128, 4


class Layer(nn.Module):
    """An adapted layer, and one without an adapter, with 4-bit weights."""

    def __init__(self, kept: Format, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base, self.alone = (kept.layer(nn.Linear(WIDTH, WIDTH, bias=bias)) for _ in range(2))
        self.a, self.b = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.alone(self.base(x) + self.b(self.a(x)) * 2.0)


class Checkpointed(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def traced(layer: nn.Module, requires_grad: bool = True) -> tuple[fx.GraphModule, list[Any]]:
    """Return the graph that a backend gets, and its inputs."""
    seen: list[Any] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append((gm, inputs))
        return gm.forward

    torch.compile(layer, backend=backend, fullgraph=True)(torch.randn(3, 8, WIDTH, requires_grad=requires_grad))
    return seen[0]


def results(run: Any, inputs: list[Any]) -> list[torch.Tensor]:
    """Return the output, and the gradients of all leaves."""
    leaves = [t for t in inputs if t.requires_grad]
    output = run(*inputs)[0]
    return [output, *torch.autograd.grad(output.square().sum(), leaves)]


def calls(graphs: list[fx.GraphModule], target: Any) -> int:
    return sum(called(node) is target for gm in graphs for node in gm.graph.nodes)


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    pairs = zip(found, expected, strict=True)
    return all(float((a - b).norm()) <= 1e-5 * float(b.norm()) for a, b in pairs)


@pytest.mark.parametrize("kept", [Format(), Format(nested=False), Format(storage=torch.bfloat16)], ids=str)
@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_unmatched_products_are_restored(kept: Format, requires_grad: bool, bias: bool) -> None:
    gm, inputs = traced(Layer(kept, bias), requires_grad)
    before = [(node.op, str(node.target)) for node in gm.graph.nodes]
    expected = results(gm.forward, inputs)
    proposals = propose(gm)
    assert len(proposals) == 2
    restore(gm.graph, proposals)
    gm.recompile()
    after = [(node.op, str(node.target)) for node in gm.graph.nodes]
    assert sorted(after) == sorted(pair for pair in before if pair[1] != "view" or pair in after)
    assert all(torch.equal(a, b) for a, b in zip(expected, results(gm.forward, inputs), strict=True))


@pytest.mark.parametrize("layer", [Layer, Checkpointed])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_fused_product_leaves_no_dequantized_weight(layer: Any, requires_grad: bool) -> None:
    gm, inputs = traced(layer(Format(), bias=True), requires_grad)
    expected = results(gm.forward, inputs)
    rewrite(gm, default_rules())
    graphs = list(bodies(gm))
    assert calls(graphs, lora_linear.target) == calls(graphs, dequantize_4bit.target) == 1
    given = next(i for i, tensor in enumerate(inputs) if tensor.dim() == 3)
    assert static_input_indices(gm) == frozenset(range(len(inputs))) - {given}
    run = lower(gm, inputs, "eager", "default")
    assert calls(graphs, lora_linear.target) == 1
    assert calls(graphs, dequantize_4bit.target) == 0
    assert close(results(run, inputs), expected)


class Normed(Layer):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.nn.functional.rms_norm(x, (WIDTH,), eps=1e-6))


def test_a_norm_before_a_quantized_product_is_rematerialized() -> None:
    gm, inputs = traced(Normed(Format()))
    expected = results(gm.forward, inputs)
    rewrite(gm, default_rules())
    assert [each.argument.argument for each in rematerialize.recomputable_arguments(gm.graph)] == ["x"]
    assert close(results(lower(gm, inputs, "eager", "default"), inputs), expected)


def test_products_of_graph_inputs_are_fused() -> None:
    kept = Format(nested=False)
    layers: Any = [kept.layer(nn.Linear(WIDTH, WIDTH, bias=False)) for _ in range(2)]
    a, b = (nn.Parameter(0.1 * torch.randn(shape)) for shape in ((RANK, WIDTH), (WIDTH, RANK)))
    packed = [layer.weight.data for layer in layers]
    scales = [layer.weight.quant_state.absmax for layer in layers]

    def function(x: torch.Tensor) -> torch.Tensor:
        ys = [
            torch.ops.bitsandbytes.gemm_4bit.default(x, p, [WIDTH, WIDTH], s, 64, "nf4") + (x @ a.T) @ b.T * 2.0
            for p, s in zip(packed, scales, strict=True)
        ]
        return ys[0] + ys[1]

    x = torch.randn(3, WIDTH)
    expected = function(x)
    found = torch.compile(function, backend="fastlora", fullgraph=True)(x)
    assert close([found], [expected])


def test_casts_that_only_the_product_reads_are_erased() -> None:
    layer: Any = Format(nested=False).layer(nn.Linear(WIDTH, WIDTH))
    a, b = (nn.Parameter(0.1 * torch.randn(shape)) for shape in ((RANK, WIDTH), (WIDTH, RANK)))
    packed, scales, bias = layer.weight.data, layer.weight.quant_state.absmax, layer.bias.detach()
    seen: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        seen.append(gm)
        rewrite(gm, default_rules())
        return lower(gm, inputs, "eager", "default")

    def function(x: torch.Tensor) -> torch.Tensor:
        cast, more = (t.to(torch.float32).to(torch.float32) for t in (x, bias))
        y = torch.ops.bitsandbytes.gemm_4bit.default(cast, packed, [WIDTH, WIDTH], scales, 64, "nf4", bias=more)
        return y + F.linear(F.linear(x, a), b) * 2.0

    x = torch.randn(3, WIDTH)
    found = torch.compile(function, backend=backend, fullgraph=True)(x)
    assert calls(seen, lora_linear.target) == 1
    assert [node.name for node in seen[0].graph.nodes if node.op.startswith("call") and not node.users] == []
    assert close([found], [function(x)])


def gradient_doubled(backward: fx.Graph) -> None:
    """Change the gradient."""
    product = next(node for node in backward.nodes if getattr(node.target, "__name__", None) == "matmul")
    with backward.inserting_after(product):
        other = backward.call_function(torch.mul, (product, 2.0))
    product.replace_all_uses_with(other, delete_user_cb=lambda user: user is not other)


def dequantized_otherwise(backward: fx.Graph) -> None:
    """Change the weight."""
    decoded = next(node for node in backward.nodes if "dequantize_4bit" in str(node.target))
    decoded.args = (*decoded.args[:3], "fp4", *decoded.args[4:])


@pytest.mark.parametrize("change", [gradient_doubled, dequantized_otherwise])
def test_functions_with_another_backward_are_not_replaced(change: Any) -> None:
    gm, _ = traced(Layer(Format()))
    for name, body in gm.named_children():
        if name.startswith("bwd_body"):
            change(body.graph)  # type: ignore[union-attr]
            body.recompile()  # type: ignore[union-attr]
    assert propose(gm) == []


def test_inductor_gets_the_products_as_traced() -> None:
    gm, _ = traced(Layer(Format()))
    rewrite(gm, default_rules(), reads_quantized=False)
    assert calls([gm], dequantize_4bit.target) == 0
    assert calls([gm], lora_linear.target) == 0
