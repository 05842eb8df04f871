"""A compiled model can be saved, copied, merged, evaluated and generated from like any other."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from tiny_models import batch, build, relative, step
from torch import nn

import fastlora
from fastlora.frontend import compile_graph
from fastlora.logits.deferred_logits import DeferredLogits


@pytest.fixture
def model():
    return build("llama")


def largest_difference(mine, eager) -> float:
    assert mine.gradients.keys() == eager.gradients.keys()
    return max(relative(mine.gradients[name], eager.gradients[name]) for name in eager.gradients)


def test_compile_returns_the_same_object_with_the_same_class_and_keys(model):
    kind, keys = type(model), list(model.state_dict())
    assert fastlora.compile(model) is model
    step(model, batch())
    assert type(model) is kind
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_parameters()] == [
        key for key in keys if key in dict(model.named_parameters())
    ]


def test_disable_restores_the_eager_model_bit_for_bit(model):
    before = step(model, batch())
    fastlora.compile(model)
    step(model, batch())
    assert fastlora.disable(model) is model
    after = step(model, batch())
    assert torch.equal(before.loss, after.loss)
    assert all(torch.equal(before.gradients[name], after.gradients[name]) for name in before.gradients)
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_compiling_twice_replaces_the_first_compilation(model):
    eager = step(model, batch())
    fastlora.compile(model)
    step(model, batch())
    fastlora.compile(model)
    assert fastlora.report(model).graphs == 0
    assert largest_difference(step(model, batch()), eager) < 1e-6


def test_two_compiled_models_do_not_share_a_report():
    first, second = fastlora.compile(build("llama")), fastlora.compile(build("gpt_neox"))
    step(first, batch())
    assert fastlora.report(second).graphs == 0
    step(second, batch())
    assert "glu" in fastlora.report(first).coverage
    assert fastlora.report(second).coverage["glu"].seen == 0


def test_generating_between_steps_does_not_recompile(model):
    prompt = batch()["input_ids"][:, :5]
    expected = model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False)
    fastlora.compile(model)
    step(model, batch())
    graphs = fastlora.report(model).graphs
    for _ in range(2):
        assert torch.equal(model.generate(input_ids=prompt, max_new_tokens=6, do_sample=False), expected)
        step(model, batch())
    assert fastlora.report(model).graphs == graphs


def test_evaluation_returns_ordinary_logits_equal_to_eager_ones(model):
    model.eval()
    with torch.no_grad():
        expected = model(**batch()).logits
        fastlora.compile(model)
        logits = model(**batch()).logits
    assert type(logits) is torch.Tensor
    assert torch.equal(logits, expected)


def test_training_logits_equal_eager_and_carry_gradients(model):
    expected = model(**batch()).logits
    fastlora.compile(model)
    logits = model(**batch()).logits
    assert isinstance(logits, DeferredLogits)
    assert logits.shape == expected.shape
    assert logits.dtype == expected.dtype
    assert logits.requires_grad
    assert relative(logits.detach() + 0, expected) < 1e-6
    logits.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


def test_copies_and_pickles_run_and_are_not_compiled(model):
    eager = step(model, batch())
    fastlora.compile(model)
    step(model, batch())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(fastlora.FastLoRAError, match="not compiled"):
            fastlora.report(twin)
        assert torch.equal(step(twin, batch()).loss, eager.loss)


def test_saved_adapters_reload_into_an_uncompiled_model(model, tmp_path):
    fastlora.compile(model)
    step(model, batch())
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(build("llama").unload(), tmp_path)
    saved, loaded = get_peft_model_state_dict(model), get_peft_model_state_dict(fresh)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)


def test_a_saved_state_dict_loads_back(model):
    fastlora.compile(model)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    assert not build("llama", seed=1).load_state_dict(torch.load(buffer)).missing_keys


def test_merged_weights_equal_those_of_an_uncompiled_model(model):
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    fastlora.compile(model)
    step(model, batch())
    merged = model.merge_and_unload().state_dict()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_disabled_and_switched_adapters_are_respected(model):
    from peft import LoraConfig

    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    losses = {}
    for compiled in (False, True):
        if compiled:
            fastlora.compile(model)
        for name in ("default", "second"):
            model.set_adapter(name)
            losses[name, compiled] = step(model, batch())
        with model.disable_adapter():
            losses["none", compiled] = model(**batch()).loss.detach()
    for name in ("default", "second"):
        assert relative(losses[name, True].loss, losses[name, False].loss) < 1e-6
        assert largest_difference(losses[name, True], losses[name, False]) < 2e-6
    assert relative(losses["none", True], losses["none", False]) < 1e-6


def test_several_active_adapters_add_up(model):
    from peft import LoraConfig

    model.add_adapter("second", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    eager = step(model, batch())
    fastlora.compile(model)
    compiled = step(model, batch())
    assert len(compiled.gradients) == 4 * 21
    assert largest_difference(compiled, eager) < 2e-6
    coverage = fastlora.report(model).coverage["lora"]
    assert coverage.seen == coverage.fused == 42


def test_a_requested_kv_cache_is_built_and_reported(model):
    fastlora.compile(model)
    output = model(**batch(), use_cache=True)
    assert output.past_key_values is not None
    assert any("KV cache" in note for note in fastlora.report(model).notes)


def test_training_builds_no_kv_cache_in_a_nested_decoder():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": 64, "num_key_value_heads": 2, **small}
    vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 16, **small}
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=3)
    model = fastlora.compile(LlavaForConditionalGeneration(config))
    ids = torch.randint(4, 64, (2, 6))
    output = model(input_ids=ids, labels=ids)
    assert output.past_key_values is None
    assert not fastlora.report(model).notes
    assert model(input_ids=ids, labels=ids, use_cache=True).past_key_values is not None


def test_a_custom_model_without_blocks_is_one_region():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
            self.head = nn.Linear(8, 40)

        def forward(self, x, labels):
            x = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
            return nn.functional.cross_entropy(self.head(x), labels)

    torch.manual_seed(0)
    mine = Block()
    x, labels = torch.randn(6, 8), torch.randint(0, 40, (6,))
    expected = torch.autograd.grad(mine(x, labels), list(mine.parameters()))
    fastlora.compile(mine)
    found = torch.autograd.grad(mine(x, labels), list(mine.parameters()))
    assert all(relative(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))
    coverage = fastlora.report(mine).coverage
    assert coverage["glu"].fused == 1
    assert coverage["loss"].fused == 1


def test_blocks_that_are_pytorch_classes_are_compiled():
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    x = torch.randn(2, 5, 16)
    expected = torch.autograd.grad(encoder(x).pow(3).mean(), list(encoder.parameters()))
    fastlora.compile(encoder)
    found = torch.autograd.grad(encoder(x).pow(3).mean(), list(encoder.parameters()))
    assert all(relative(a, b) < 2e-6 for a, b in zip(found, expected, strict=True))
    assert fastlora.report(encoder).coverage["norm"].fused == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lower": "fast"}, "lower must be one of 'auto', 'eager', 'inductor'; got 'fast'"),
        ({"mode": "turbo"}, "mode must be one of .*; got 'turbo'"),
        ({"mode": "max-autotune", "lower": "eager"}, "lower='inductor'"),
        ({"memory_budget": "16 gigs"}, "memory_budget must be .* such as '8GiB' or '500MB'; got '16 gigs'"),
    ],
)
def test_bad_arguments_are_named_with_their_value(model, arguments, words):
    with pytest.raises(fastlora.FastLoRAError, match=words):
        fastlora.compile(model, **arguments)


def test_compiling_a_torch_compile_wrapper_is_an_error(model):
    with pytest.raises(fastlora.FastLoRAError, match="_orig_mod"):
        fastlora.compile(torch.compile(model))


def test_strict_raises_for_a_candidate_that_is_not_fused(model):
    fastlora.compile(model, strict=True, rules=[r for r in fastlora.default_rules() if r.name != "rotary"])
    step(model, batch())  # without the rule there is no candidate

    class Scaled(nn.Module):
        def forward(self, x):
            activated = nn.functional.silu(x)
            return activated * x.square() + activated

    widened = build("llama")
    widened.base_model.model.model.layers[0].mlp.act_fn = Scaled()
    fastlora.compile(widened, strict=True)
    with pytest.raises(fastlora.StrictError, match="glu"):
        step(widened, batch())


class BrokenBlock(nn.Module):
    """A block with a graph break."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu()
        torch._dynamo.graph_break()
        return self.second(y).relu()


@pytest.mark.parametrize("failure", [AssertionError, fastlora.FastLoRAError])
def test_code_after_a_graph_break_may_run_uncompiled(failure, monkeypatch):
    """The code before the break has run by then. Errors of fastlora itself are raised."""
    torch.manual_seed(0)
    model = nn.Sequential(BrokenBlock(), BrokenBlock())
    x = torch.randn(3, 8)
    expected = model(x)
    wanted = torch.autograd.grad(expected.sum(), list(model.parameters()))
    made = compile_graph.rewrite

    def fail_at_the_second_graph(gm, *args, **kwargs):
        calls.append(gm)
        if len(calls) == 2:
            raise failure("at the second graph")
        return made(gm, *args, **kwargs)

    calls = []
    monkeypatch.setattr(compile_graph, "rewrite", fail_at_the_second_graph)
    fastlora.compile(model)
    if failure is fastlora.FastLoRAError:
        with pytest.raises(fastlora.FastLoRAError, match="at the second graph"):
            model(x)
        return
    found = model(x)
    assert len(calls) > 1
    assert torch.equal(found, expected)
    assert all(map(torch.equal, torch.autograd.grad(found.sum(), list(model.parameters())), wanted))
    assert torch._dynamo.config.suppress_errors is False


def test_a_compiled_model_is_freed_with_its_last_reference():
    """TorchDynamo keeps compiled code and its backend longer than the model."""
    model = fastlora.compile(build("llama"))
    model(**batch()).loss.backward()
    alive = [weakref.ref(model), *(weakref.ref(p) for p in model.parameters())]
    del model
    gc.collect()
    assert not any(ref() is not None for ref in alive)
