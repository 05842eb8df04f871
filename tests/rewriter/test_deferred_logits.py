"""Deferred logits: cross-entropies of them are fused, and everything else reads the ordinary logits."""

import pytest
import torch
import torch.nn.functional as F
from deferred_heads import LABELS, VOCABULARY, WIDTH, Heads, assert_same, shifted
from tiny_models import relative
from torch import nn

import fastlora
from fastlora.frontend.head_gate import deferral_problem

FUSED = {
    "plain": lambda z: F.cross_entropy(z.view(-1, VOCABULARY), LABELS.view(-1)),
    "reshaped": lambda z: F.cross_entropy(z.reshape((-1, VOCABULARY)), LABELS.view(-1)),
    "shifted": shifted,
    "upcast": lambda z: shifted(z.float()),
    "cast by keyword": lambda z: shifted(z.to(dtype=torch.float32)),
    "summed": lambda z: shifted(z, reduction="sum") / 7,
    "each": lambda z: shifted(z, reduction="none"),
    "ignoring": lambda z: shifted(z, ignore_index=int(LABELS[0, 1])),
    "smoothed": lambda z: shifted(z, label_smoothing=0.2),
    "scaled": lambda z: shifted(z * 0.5),
    "scaled from the left": lambda z: shifted(0.5 * z),
    "divided": lambda z: shifted(z / 3.0),
    "capped": lambda z: shifted(torch.tanh(z / 5.0) * 5.0),
    "capped after scaling": lambda z: shifted((z * 2.0 / 5.0).tanh() * 5.0),
    "one sequence": lambda z: F.cross_entropy(z[0:1, 2:].view(-1, VOCABULARY), LABELS[0, 2:]),
    "module": lambda z: nn.CrossEntropyLoss()(z.view(-1, VOCABULARY), LABELS.view(-1)),
    "flattened": lambda z: F.cross_entropy(z[:, :-1].flatten(0, 1).float(), LABELS[:, 1:].flatten()),
    "unflattened": lambda z: F.cross_entropy(z.unflatten(0, (1, 2)).flatten(0, 2), LABELS.view(-1)),
    "squeezed": lambda z: F.cross_entropy(z[:1].squeeze(0), LABELS[0]),
    "unsqueezed": lambda z: F.cross_entropy(z.unsqueeze(1).reshape(-1, VOCABULARY), LABELS.view(-1)),
    "moved": lambda z: F.cross_entropy(z.movedim(0, 1).reshape(-1, VOCABULARY), LABELS.t().reshape(-1)),
    "transposed": lambda z: F.cross_entropy(z.transpose(0, 1).reshape(-1, VOCABULARY), LABELS.t().reshape(-1)),
    "permuted": lambda z: F.cross_entropy(z.permute(1, 0, 2).reshape(-1, VOCABULARY), LABELS.t().reshape(-1)),
    "a row": lambda z: F.cross_entropy(z[1], LABELS[1]),
    "rows by mask": lambda z: F.cross_entropy(z[LABELS > 9], LABELS[LABELS > 9]),
    "rows by number": lambda z: F.cross_entropy(
        z[:, torch.tensor([2, 0])].view(-1, VOCABULARY), LABELS[:, [2, 0]].view(-1)
    ),
    "narrowed": lambda z: F.cross_entropy(z.narrow(1, 1, 3).reshape(-1, VOCABULARY), LABELS[:, 1:4].reshape(-1)),
    "reshaped by keyword": lambda z: F.cross_entropy(z.reshape(shape=(-1, VOCABULARY)), LABELS.view(-1)),
}


IN_PIECES = {
    "chunks": lambda z: z.chunk(2, 1),
    "splits": lambda z: z.split([1, 4], dim=1),
    "one by one": lambda z: z.unbind(0),
}


@pytest.mark.parametrize("name", IN_PIECES)
def test_losses_of_split_logits_are_fused(name):
    def use(z):
        pairs = zip(IN_PIECES[name](z), IN_PIECES[name](LABELS), strict=True)
        return sum(F.cross_entropy(part.reshape(-1, VOCABULARY), labels.reshape(-1)) for part, labels in pairs)

    heads = Heads(bias=True)
    assert_same(heads.both(use))
    assert (heads.deferral_stats.fused, heads.deferral_stats.materialized) == (2, {})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_a_fused_cross_entropy_equals_the_ordinary_one(name, bias):
    heads = Heads(bias)
    assert_same(heads.both(FUSED[name]))
    assert heads.deferral_stats.fused == 1
    assert not heads.deferral_stats.materialized


OTHER = {
    "class weights": lambda z: shifted(z, weight=torch.linspace(0.5, 1.5, VOCABULARY)),
    "classes second": lambda z: F.cross_entropy(z.transpose(1, 2), LABELS),
    "probabilities": lambda z: F.cross_entropy(z.view(-1, VOCABULARY), torch.full((10, VOCABULARY), 1 / VOCABULARY)),
    "log softmax": lambda z: F.log_softmax(z, -1).gather(-1, LABELS[..., None]),
    "arithmetic": lambda z: (z * z + 1).mean(),
    "negative scale": lambda z: shifted(z * -1.0),
    "tensor scale": lambda z: shifted(z * torch.tensor(2.0)),
    "part of the vocabulary": lambda z: z[..., :7].square().sum(),
    "one position": lambda z: z[:, -1].square().sum(),
    "concatenation": lambda z: torch.cat([z, z], -1).square().sum(),
    "narrowing": lambda z: shifted(z.to(torch.bfloat16)).float(),
    "two tanh": lambda z: shifted(torch.tanh(torch.tanh(z))),
    "in place": lambda z: shifted(z.clone().mul_(2.0)),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_uses_read_ordinary_logits_with_gradients(name):
    heads = Heads(bias=True)
    assert_same(heads.both(OTHER[name]))
    assert sum(heads.deferral_stats.materialized.values()) == 1
    (line,) = heads.deferral_stats.materialized
    assert line.partition(":")[0] in ("test_deferred_logits.py", "deferred_heads.py")


@pytest.mark.parametrize("shape", [(VOCABULARY,), (1, VOCABULARY), (1, 1, VOCABULARY)])
def test_a_bias_added_to_logits_becomes_the_heads_bias(shape):
    heads, bias = Heads(), torch.randn(shape, requires_grad=True)
    results = heads.both(lambda z: shifted(z + bias))
    assert_same(results)
    assert (heads.deferral_stats.fused, heads.deferral_stats.materialized) == (1, {})
    gradients = [
        torch.autograd.grad(shifted(head(heads.hidden) + bias), bias)[0] for head in (heads.head, heads.deferred_head)
    ]
    assert relative(gradients[1], gradients[0]) < 1e-6
    assert torch.equal((heads.deferred_head(heads.hidden) + bias) * 1.0, heads.head(heads.hidden) + bias)


@pytest.mark.parametrize(
    "use",
    [
        lambda z, bias: shifted(z.add(bias, alpha=2)),
        lambda z, bias: shifted(z * 2.0 + bias),
        lambda z, bias: shifted(z + bias + bias),
        lambda z, bias: shifted(z + bias.double()),
        lambda z, bias: shifted(z + bias[:1]),
        lambda z, bias: shifted(bias + z),
    ],
)
def test_other_additions_materialize_logits(use):
    heads, bias = Heads(), torch.randn(VOCABULARY)
    assert_same(heads.both(lambda z: use(z, bias)))
    assert heads.deferral_stats.fused == 0


def test_keyword_arguments_keep_logits_deferred():
    heads, bias = Heads(), torch.randn(VOCABULARY)
    for use in (
        lambda z: shifted(torch.add(input=z, other=bias)),
        lambda z: shifted(torch.mul(input=z, other=0.5)),
        lambda z: shifted(torch.tanh(input=z)),
    ):
        assert_same(heads.both(use))
    assert (heads.deferral_stats.fused, heads.deferral_stats.materialized) == (3, {})


def test_a_trained_bias_makes_logits_of_a_frozen_head_require_grad():
    heads = Heads()
    logits = heads.deferred_head(heads.hidden).detach()
    assert not logits.requires_grad
    assert (logits + torch.zeros(VOCABULARY, requires_grad=True)).requires_grad


def test_an_inference_tensor_can_be_added_to_logits():
    heads = Heads()
    with torch.inference_mode():
        bias = torch.ones(VOCABULARY)
    assert torch.equal((heads.deferred_head(heads.hidden) + bias) * 1.0, heads.head(heads.hidden) + bias)


def test_an_in_place_write_to_an_added_bias_raises():
    heads, bias = Heads(), torch.zeros(VOCABULARY)
    logits = heads.deferred_head(heads.hidden) + bias
    bias.add_(1)
    with pytest.raises(fastlora.FastLoRAError, match="modified in place"):
        shifted(logits)


def test_a_frozen_head_passes_the_gradient_to_hidden_states():
    heads = Heads(frozen=True)
    assert_same(heads.both(shifted))
    assert heads.head.weight.grad is None


def test_under_autocast_logits_have_the_autocast_dtype():
    heads = Heads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert heads.deferred_head(heads.hidden).dtype == torch.bfloat16
    assert_same(heads.both(lambda z: shifted(z.float()), autocast=True), bound=1e-2)


def test_a_loss_is_fused_after_reads_but_not_after_writes():
    heads = Heads()
    logits = heads.deferred_head(heads.hidden)
    assert logits.argmax(-1).shape == (2, 5)
    shifted(logits)
    assert heads.deferral_stats.fused == 1
    logits.detach().mul_(0.5)
    shifted(logits)
    assert heads.deferral_stats.fused == 1
    assert sum(heads.deferral_stats.materialized.values()) == 1


def test_heads_without_gradients_or_with_hooks_are_not_deferred():
    heads = Heads()
    with torch.no_grad():
        assert type(heads.deferred_head(heads.hidden)) is torch.Tensor
    heads.head.register_forward_hook(lambda module, inputs, output: output * 2)
    assert torch.equal(heads.deferred_head(heads.hidden), heads.head(heads.hidden))


def test_only_plain_linear_vocabulary_heads_defer():
    class DoubledLinear(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2.0

    assert deferral_problem(nn.Linear(8, 40)) is None
    assert deferral_problem(nn.Linear(40, 8)) is not None
    assert deferral_problem(DoubledLinear(8, 40)) is not None
    assert deferral_problem(None) is not None


def test_compiled_functions_get_ordinary_logits():
    heads = Heads()
    assert_same(heads.both(torch.compile(shifted, backend="eager")))


def test_modes_and_parametrizations_see_the_head():
    class Doubled(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return result * 2 if func is F.linear else result

    heads = Heads()
    with Doubled():
        found, expected = heads.deferred_head(heads.hidden), heads.head(heads.hidden)
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)
    nn.utils.parametrizations.spectral_norm(heads.head)
    assert type(heads.deferred_head(heads.hidden)) is torch.Tensor


def test_invalid_inputs_raise_as_for_a_linear_layer():
    heads = Heads()
    for wrong in (
        torch.randn(2, WIDTH, dtype=torch.bfloat16, requires_grad=True),
        torch.randn(2, 3, requires_grad=True),
    ):
        with pytest.raises(RuntimeError):
            heads.deferred_head(wrong)


def test_autocast_does_not_cast_float64():
    heads = Heads(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert heads.deferred_head(heads.hidden).dtype is heads.head(heads.hidden).dtype is torch.float64
