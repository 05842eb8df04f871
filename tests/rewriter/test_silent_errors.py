"""Ways in which a graph compiler can be silently wrong, each with a test that it is not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny_models import batch, build, step
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.kernels import ops
from fastlora.logits.deferred_logits import DeferredLogits


def traced(function, *inputs):
    """Return the graph that TorchDynamo traces for a function, and the result of fastlora's backend."""
    graphs = []

    def capture(gm, examples):
        graphs.append(gm)
        return gm.forward

    torch.compile(function, backend=capture)(*inputs)
    return graphs[0]


class Norm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_t1_in_place_operations_without_users_survive_the_pass():
    norm, seen = Norm(8), torch.zeros(8)

    def forward(x):
        y = norm(x)
        seen.add_(1.0)
        return y

    compiled = torch.compile(forward, backend="fastlora")
    compiled(torch.randn(2, 8)).sum().backward()
    assert torch.equal(seen, torch.ones(8))
    assert fastlora.report().coverage["norm"].fused


def test_t2_dropout_in_a_checkpoint_is_recomputed_with_its_mask():
    torch.manual_seed(0)
    norm = Norm(8)
    linear = nn.Linear(8, 8)

    def region(x):
        return F.dropout(norm(linear(x)), 0.5, True)

    def forward(x):
        return checkpoint(region, x, use_reentrant=False).square().sum()

    x = torch.randn(4, 8)
    gradients = []
    for run in (forward, torch.compile(forward, backend="fastlora")):
        torch.manual_seed(3)
        linear.zero_grad()
        run(x).backward()
        gradients.append(linear.weight.grad.clone())
    assert torch.allclose(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ops.__all__)
def test_t3_t4_no_operator_writes_to_its_arguments(name):
    for target in (getattr(ops, name).target, getattr(ops, name).backward_target):
        assert not target._schema.is_mutable


def test_t5_a_second_derivative_through_a_fused_op_raises():
    x = torch.randn(3, 8, requires_grad=True)
    y = torch.compile(Norm(8), backend="fastlora")(x)
    with pytest.raises(RuntimeError, match="rms_norm has no second derivative"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_t8_the_kernels_folder_shadows_no_package():
    root = Path(__file__).parents[2]
    program = (
        f"import sys; sys.path.insert(0, {str(root)!r}); import transformers, kernels; "
        "import importlib.metadata as m; "
        "installed = any(d.metadata['Name'] == 'kernels' for d in m.distributions()); "
        f"assert not installed or not kernels.__file__.startswith({str(root)!r}); "
        "assert 'fastlora' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd="/")


def test_t9_blocks_that_are_pytorch_classes_are_compiled():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    fastlora.compile(encoder)
    encoder(torch.randn(2, 3, 8)).sum().backward()
    assert fastlora.report(encoder).graphs > 0


@pytest.mark.parametrize("ambient", [True, False], ids=["ambient", "in the graph"])
def test_t10_autocast_decides_the_dtype_of_every_product(ambient):
    torch.manual_seed(0)
    base, a, b = nn.Linear(16, 16), nn.Linear(16, 4, bias=False), nn.Linear(4, 16, bias=False)

    def adapted(x):
        return base(x) + b(a(x)) * 2.0

    def forward(x):
        if ambient:
            return adapted(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return adapted(x)

    x = torch.randn(3, 16)
    results = []
    for run in (forward, torch.compile(forward, backend="fastlora")):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=ambient):
            results.append(run(x))
    assert results[1].dtype == torch.bfloat16
    assert torch.equal(results[0], results[1])
    assert fastlora.report().coverage["lora"].fused


def test_t11_generation_and_evaluation_use_up_no_recompiles():
    model = fastlora.compile(build("llama"))
    step(model, batch())
    graphs = fastlora.report(model).graphs
    for length in range(4, 14):
        model.generate(input_ids=batch(length)["input_ids"], max_new_tokens=2, do_sample=False)
        with torch.no_grad():
            model(**batch(length))
    step(model, batch())
    assert fastlora.report(model).graphs == graphs


def test_t12_compiled_blocks_keep_causal_attention_without_a_mask():
    model = fastlora.compile(build("llama"))
    inputs = {key: value for key, value in batch().items() if key != "attention_mask"}
    step(model, inputs)
    code = "\n".join(fastlora.report(model).code.values())
    assert "is_causal = True" in code
    assert "attn_mask = None" in code


@pytest.mark.parametrize("whole", [True, False])
def test_t13_a_training_step_makes_no_logits(whole):
    model = build("llama")
    run = torch.compile(model, backend="fastlora") if whole else fastlora.compile(model)
    output = run(**batch(), use_cache=False)
    output.loss.backward()
    report = fastlora.report(None if whole else model)
    assert report.coverage["loss"].fused
    assert isinstance(output.logits, DeferredLogits)
    assert not output.logits.lazy.is_computed


def test_t14_rewritten_graphs_are_readable_python():
    gm = traced(Norm(8), torch.randn(2, 8))
    fastlora.rewrite.pipeline.rewrite(gm, fastlora.default_rules())
    assert str(ops.rms_norm.target) in gm.code
    compile(gm.code, "graph", "exec")


def test_compiling_inside_a_checkpoint_is_not_recorded(monkeypatch):
    """A checkpoint counts saved tensors, so the first call, which compiles, must not save more than others."""
    monkeypatch.setattr("fastlora.graph.effects._PROBED", {})
    monkeypatch.setattr("fastlora.rewrite.verify._VERIFIED", {})
    model = build("gpt_neox", dropout=0.1)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    fastlora.compile(model, verify=True)
    assert step(model, batch()).gradients
