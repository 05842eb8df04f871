"""Changes to modules after compilation take effect: hooks, forwards, classes, attributes, replicas, wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import assert_equal, batch, build, relative, step
from torch import nn
from torch.func import functional_call, grad
from torch.nn.modules import module as torch_module
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import fastlora
from fastlora.errors import FastLoRAError, StrictError

Change = Callable[[nn.Module], Any]


def layer(model: Any) -> Any:
    return model.base_model.model.model.layers[1]


def hook_on_inner(model: nn.Module) -> Any:
    return layer(model).self_attn.register_forward_hook(lambda m, i, o: (o[0] * 1.5, *o[1:]))


def hook_on_layer(model: nn.Module) -> Any:
    return layer(model).register_forward_hook(lambda m, i, o: o * 1.5)


def pre_hook(model: nn.Module) -> Any:
    return layer(model).mlp.register_forward_pre_hook(lambda m, i: (i[0] * 0.5,))


def backward_hook(model: nn.Module) -> Any:
    return layer(model).mlp.register_full_backward_hook(lambda m, gi, go: (gi[0] * 0.5,))


def backward_pre_hook(model: nn.Module) -> Any:
    return layer(model).mlp.register_full_backward_pre_hook(lambda m, go: (go[0] * 0.5,))


def hook_on_norm(model: nn.Module) -> Any:
    return model.base_model.model.model.norm.register_forward_hook(lambda m, i, o: o * 0.5)


def hook_on_head(model: nn.Module) -> Any:
    return model.base_model.model.lm_head.register_forward_hook(lambda m, i, o: o * 3.0)


def hook_on_every_module(model: nn.Module) -> Any:
    return torch_module.register_module_forward_hook(
        lambda m, i, o: o * 1.5 if type(m).__name__ == "LlamaMLP" else None
    )


HOOKS = (
    hook_on_inner, hook_on_layer, pre_hook, backward_hook, backward_pre_hook, hook_on_norm, hook_on_head,
    hook_on_every_module,
)  # fmt: skip


@pytest.mark.parametrize("register", HOOKS, ids=lambda register: register.__name__)
def test_hooks_added_after_compilation_run_until_removed(register: Change) -> None:
    steps = []
    for compiled in (False, True):
        model = build("llama")
        if compiled:
            fastlora.compile(model)
        without = step(model, batch())
        handle = register(model)
        try:
            hooked = step(model, batch())
        finally:
            handle.remove()
        steps.append((without, hooked, step(model, batch())))
    for found, expected in zip(steps[1], steps[0], strict=True):
        assert_equal(found, expected)
    assert relative(steps[0][1].loss, steps[0][0].loss) > 1e-4 or "backward" in register.__name__


def replaced_head(model: Any) -> None:
    head = model.base_model.model.lm_head
    forward = head.forward
    head.forward = lambda x: forward(x) * 3.0


def other_class_of_head(model: Any) -> None:
    class Tripled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 3.0

    model.base_model.model.lm_head.__class__ = Tripled


def replaced_inner(model: Any) -> None:
    mlp = layer(model).mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x) * 1.5


def other_class_of_inner(model: Any) -> None:
    mlp = layer(model).mlp
    forward = type(mlp).forward
    mlp.__class__ = type("Scaled", (type(mlp),), {"forward": lambda self, x: forward(self, x) * 1.5})


def replaced_module(model: Any) -> None:
    layer(model).mlp.act_fn = nn.Tanh()


def module_with_a_hook(model: Any) -> None:
    old = layer(model).mlp
    new = copy.deepcopy(old)
    new.register_forward_hook(lambda m, i, o: o * 1.5)
    step(model, batch())
    layer(model).mlp = new


CHANGES = (
    module_with_a_hook,
    replaced_head,
    other_class_of_head,
    replaced_inner,
    other_class_of_inner,
    replaced_module,
)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after a step"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_replaced_forwards_and_classes_are_called(change: Change, after: bool) -> None:
    steps = []
    for compiled in (False, True):
        model = build("llama")
        if compiled and after:
            fastlora.compile(model)
            step(model, batch())
        change(model)
        if compiled and not after:
            fastlora.compile(model)
        steps.append(step(model, batch()))
    assert_equal(steps[1], steps[0])


def test_numbers_that_change_become_inputs_of_the_graph() -> None:
    eager = build("llama", target_modules=["q_proj"])
    model = fastlora.compile(copy.deepcopy(eager))
    graphs = []
    for k in range(6):
        for each in (eager, model):
            for module in each.modules():
                if hasattr(module, "lora_A"):
                    module.scaling["default"] = 0.1 * (k + 1)
        assert_equal(step(model, batch()), step(eager, batch()))
        graphs.append(fastlora.report(model).graphs)
    assert graphs[1] == graphs[-1]
    coverage = fastlora.report(model).coverage["lora"]
    assert coverage.fused == coverage.seen == 3


class Layer(nn.Module):
    """A layer whose code depends on a number that cannot be traced as an input."""

    def __init__(self, flavor: str) -> None:
        super().__init__()
        self.flavor = flavor
        self.base = nn.Linear(8, 8).requires_grad_(False)
        self.a, self.b = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.b(self.a(x)) * float(len(self.flavor))


class Deep(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer("x" * (i + 1)) for i in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for each in self.layers:
            x = torch.tanh(each(x))
        return x.square().mean()


def test_layers_past_the_recompile_limit_count_as_not_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastlora.frontend.gate._GRAPHS_PER_BLOCK", 3)
    model = fastlora.compile(Deep(6))
    model(torch.randn(2, 8)).backward()
    report = fastlora.report(model)
    coverage = report.coverage["lora"]
    assert (coverage.seen, coverage.fused) == (6, 3)
    assert sum("uncompiled" in miss.reason for miss in report.missed) == 3
    torch.compiler.reset()
    with pytest.raises(StrictError, match=r"layers\.3 runs uncompiled"):
        fastlora.compile(Deep(6), strict=True)(torch.randn(2, 8))


def replicate(module: nn.Module) -> Any:
    """Replicate a module as nn.parallel.replicate does, on one device."""
    modules = list(module.modules())
    copies: list[Any] = [m._replicate_for_data_parallel() for m in modules]  # type: ignore[operator]
    at = {m: i for i, m in enumerate(modules)}
    for original, replica in zip(modules, copies, strict=True):
        for name, child in original._modules.items():
            if child is not None:
                setattr(replica, name, copies[at[child]])
        for name, parameter in original._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.clone())
    return copies[0]


def test_data_parallel_replicas_run_their_own_modules() -> None:
    losses = []
    for compiled in (False, True):
        model = build("llama")
        if compiled:
            fastlora.compile(model)
            step(model, batch())
        replica = replicate(model)
        for name, module in replica.named_modules():  # to detect a call of the original
            if name.endswith(("lora_B.default", "lm_head")):
                module.weight = module.weight * 2.0
        losses.append(replica(**batch()).loss)
    assert relative(losses[1], losses[0]) < 1e-6
    notes = fastlora.report(model).notes
    assert any("replica" in note and "DistributedDataParallel" in note for note in notes)


def test_transforms_of_functions_run_uncompiled_and_are_noted() -> None:
    eager = build("llama")
    model = fastlora.compile(copy.deepcopy(eager))
    step(model, batch())
    gradients = []
    for each in (eager, model):
        trained = {name: p.detach() for name, p in each.named_parameters() if p.requires_grad}

        def loss(parameters: dict[str, torch.Tensor], each: nn.Module = each) -> torch.Tensor:
            made: torch.Tensor = functional_call(each, parameters, kwargs=batch()).loss
            return made

        gradients.append(grad(loss)(trained))
    for name, expected in gradients[0].items():
        assert relative(gradients[1][name], expected) < 1e-5
    assert any("torch.func" in note for note in fastlora.report(model).notes)


class Wrapper(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


def test_a_model_inside_a_wrapper_is_fused_as_by_itself() -> None:
    expected = step(build("llama"), batch())
    wrapper = fastlora.compile(Wrapper(build("llama")))
    found = step(wrapper, batch())
    assert relative(found.loss, expected.loss) < 1e-6
    for report in (fastlora.report(wrapper), fastlora.report(wrapper.inner)):
        assert {name: c.fused for name, c in report.coverage.items()} == {
            name: c.seen for name, c in report.coverage.items()
        }
        assert report.coverage["lora"].seen == 21
        assert not [note for note in report.notes if "KV cache" in note]


def test_a_replaced_forward_gets_no_use_cache() -> None:
    model: Any = fastlora.compile(build("llama"))
    expected = step(model, batch())
    forward = model.forward

    def own_loss(inputs: dict[str, torch.Tensor], scale: float) -> torch.Tensor:
        model.forward = forward
        made: torch.Tensor = scale * model(**inputs).loss
        return made

    def swapped(*args: Any, **kwargs: Any) -> torch.Tensor:
        return own_loss(*args, **kwargs)

    model.forward = swapped
    assert relative(model(batch(), 2.0), 2.0 * expected.loss) < 1e-6


def test_a_head_in_modules_to_save_has_its_loss_fused() -> None:
    expected = step(build("llama", modules_to_save=["lm_head"]), batch())
    model = fastlora.compile(build("llama", modules_to_save=["lm_head"]))
    assert_equal(step(model, batch()), expected)
    assert fastlora.report(model).coverage["loss"].fused == 1


def test_a_head_of_subclassed_weights_is_not_reported_as_fused() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.middle = nn.Embedding(40, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 64, bias=False)

        def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            logits = self.head(torch.tanh(self.middle(self.embedding(ids))))
            return nn.functional.cross_entropy(logits.view(-1, 64), labels.view(-1))

    model = Model()
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "head")
    fastlora.compile(model)
    model(torch.randint(0, 40, (2, 5)), torch.randint(0, 64, (2, 5))).backward()
    report = fastlora.report(model)
    assert (report.coverage["loss"].seen, report.coverage["loss"].fused) == (1, 0)
    assert any(miss.op == "loss" and "is of the tensor subclass" in miss.reason for miss in report.missed)


def test_a_head_that_cannot_defer_is_reported_with_the_reason() -> None:
    model = build("llama")
    replaced_head(model)
    fastlora.compile(model)
    step(model, batch())
    report = fastlora.report(model)
    assert (report.coverage["loss"].seen, report.coverage["loss"].fused) == (1, 0)
    assert any("whose forward was replaced" in miss.reason for miss in report.missed)
    with pytest.raises(StrictError, match="whose forward was replaced"):
        fastlora.compile(model, strict=True)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fastlora.compile(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2))), "TorchScript"),
        (lambda: fastlora.compile(nn.Sequential(torch.jit.script(nn.Linear(2, 2)))), "the module '0' of model"),
        (lambda: fastlora.compile(nn.Linear(2, 2, device="meta")), "meta device"),
        (lambda: fastlora.explain("model"), "model must be an nn.Module; got a str"),  # type: ignore[arg-type]
        (lambda: fastlora.compile("model"), "model must be an nn.Module; got a str"),  # type: ignore[type-var]
        (lambda: fastlora.disable(None), "model must be an nn.Module; got a NoneType"),  # type: ignore[type-var]
        (lambda: fastlora.report("x"), "model must be an nn.Module; got a str"),  # type: ignore[arg-type]
        (lambda: fastlora.compile(nn.Linear(2, 2), strict="no"), "strict must be True or False; got 'no'"),  # type: ignore[arg-type]
        (lambda: fastlora.compile(nn.Linear(2, 2), verify="yes"), "verify must be .* got 'yes'"),
        (lambda: fastlora.compile(nn.Linear(2, 2), rules="all"), "rules='all'"),  # type: ignore[arg-type]
        (lambda: fastlora.explain(build("llama"), batch()), r"explain\(model, \*\*batch\)"),  # type: ignore[arg-type]
    ],
)
def test_invalid_arguments_are_refused_in_one_sentence(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(FastLoRAError, match=message):
        call()
