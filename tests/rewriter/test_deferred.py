"""Deferred logits are never wrong: what can be fused is, and everything else sees the ordinary tensor."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from tiny_models import relative
from torch import nn

import fastlora
from fastlora.frontend.head_gate import HeadGate, deferral_problem
from fastlora.frontend.options import Options
from fastlora.frontend.session import Session
from fastlora.logits.deferred_logits import DeferredGradient, DeferredLogits

VOCABULARY, WIDTH = 40, 8
LABELS = torch.randint(0, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(0))


class Heads:
    """One hidden state and head, run as they are and deferred."""

    def __init__(self, bias: bool = False, dtype: torch.dtype = torch.float32, frozen: bool = False) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(2, 5, WIDTH, dtype=dtype, requires_grad=True)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias, dtype=dtype).requires_grad_(not frozen)
        session = Session(Options())
        self.deferral_stats = session.deferral_stats
        self.deferring = HeadGate(self.head, session)

    def both(self, use, **autocast):
        """What `use` makes of ordinary and of deferred logits, with the gradients of all that it came from."""
        results = []
        for head in (self.head, self.deferring):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast.get("autocast", False)):
                value = use(head(self.hidden))
            wanted = [t for t in (self.hidden, *self.head.parameters()) if t.requires_grad]
            gradients = torch.autograd.grad(value.float().sum(), wanted, allow_unused=True)
            results.append((value.detach(), gradients))
        return results


def assert_same(results, bound: float = 1e-6) -> None:
    (expected, wanted), (found, gradients) = results
    assert relative(found, expected) < bound
    for mine, its in zip(gradients, wanted, strict=True):
        assert (mine is None) == (its is None)
        assert mine is None or relative(mine, its) < bound


def shifted(logits, labels=LABELS, **options):
    return F.cross_entropy(
        logits[..., :-1, :].contiguous().view(-1, VOCABULARY), labels[..., 1:].reshape(-1), **options
    )


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
def test_losses_of_pieces_are_fused(name):
    def use(z):
        pairs = zip(IN_PIECES[name](z), IN_PIECES[name](LABELS), strict=True)
        return sum(F.cross_entropy(part.reshape(-1, VOCABULARY), labels.reshape(-1)) for part, labels in pairs)

    heads = Heads(bias=True)
    assert_same(heads.both(use))
    assert (heads.deferral_stats.fused, heads.deferral_stats.materialized) == (2, {})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", FUSED)
def test_a_cross_entropy_is_fused_and_equals_the_ordinary_one(name, bias):
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
def test_anything_else_sees_ordinary_logits_with_gradients(name):
    heads = Heads(bias=True)
    assert_same(heads.both(OTHER[name]))
    assert sum(heads.deferral_stats.materialized.values()) == 1
    assert next(iter(heads.deferral_stats.materialized)).startswith("test_deferred.py:")


@pytest.mark.parametrize("shape", [(VOCABULARY,), (1, VOCABULARY), (1, 1, VOCABULARY)])
def test_a_bias_that_is_added_to_the_logits_is_the_heads(shape):
    heads, bias = Heads(), torch.randn(shape, requires_grad=True)
    results = heads.both(lambda z: shifted(z + bias))
    assert_same(results)
    assert (heads.deferral_stats.fused, heads.deferral_stats.materialized) == (1, {})
    gradients = [
        torch.autograd.grad(shifted(head(heads.hidden) + bias), bias)[0] for head in (heads.head, heads.deferring)
    ]
    assert relative(gradients[1], gradients[0]) < 1e-6
    assert torch.equal((heads.deferring(heads.hidden) + bias) * 1.0, heads.head(heads.hidden) + bias)


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
def test_other_sums_are_ordinary(use):
    heads, bias = Heads(), torch.randn(VOCABULARY)
    assert_same(heads.both(lambda z: use(z, bias)))
    assert heads.deferral_stats.fused == 0


def test_operations_by_keyword_are_the_same_operations():
    heads, bias = Heads(), torch.randn(VOCABULARY)
    for use in (
        lambda z: shifted(torch.add(input=z, other=bias)),
        lambda z: shifted(torch.mul(input=z, other=0.5)),
        lambda z: shifted(torch.tanh(input=z)),
    ):
        assert_same(heads.both(use))
    assert (heads.deferral_stats.fused, heads.deferral_stats.materialized) == (3, {})


def test_a_trained_bias_makes_logits_of_a_frozen_head_want_gradients():
    heads = Heads()
    logits = heads.deferring(heads.hidden).detach()
    assert not logits.requires_grad
    assert (logits + torch.zeros(VOCABULARY, requires_grad=True)).requires_grad


def test_what_was_made_in_inference_mode_can_be_added():
    heads = Heads()
    with torch.inference_mode():
        bias = torch.ones(VOCABULARY)
    assert torch.equal((heads.deferring(heads.hidden) + bias) * 1.0, heads.head(heads.hidden) + bias)


def test_a_bias_that_changed_since_raises():
    heads, bias = Heads(), torch.zeros(VOCABULARY)
    logits = heads.deferring(heads.hidden) + bias
    bias.add_(1)
    with pytest.raises(fastlora.FastLoRAError, match="modified in place"):
        shifted(logits)


def test_writing_to_logits_reaches_their_views_and_not_their_copies():
    def use(z):
        view, copied = z.view(-1, VOCABULARY), z.double()
        z[..., 3] = 9.0
        z.mul_(2.0)
        return shifted(z).double() + F.cross_entropy(view, LABELS.view(-1)).double() + copied.square().mean()

    assert_same(Heads().both(use))


def test_a_detached_copy_carries_no_gradient():
    heads = Heads()
    logits = heads.deferring(heads.hidden)
    cut = logits.detach()
    assert not cut.requires_grad
    assert logits.requires_grad
    assert not F.cross_entropy(cut.view(-1, VOCABULARY), LABELS.view(-1)).requires_grad


def test_a_frozen_head_gets_no_gradient_and_passes_one_on():
    heads = Heads(frozen=True)
    assert_same(heads.both(shifted))
    assert heads.head.weight.grad is None


def test_under_autocast_the_product_is_in_its_dtype():
    heads = Heads()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert heads.deferring(heads.hidden).dtype == torch.bfloat16
    assert_same(heads.both(lambda z: shifted(z.float()), autocast=True), bound=1e-2)


def test_metadata_does_not_multiply():
    heads = Heads()
    logits = heads.deferring(heads.hidden)
    assert isinstance(logits, torch.Tensor)
    assert (logits.shape, logits.ndim, logits.size(-1), logits.numel()) == ((2, 5, VOCABULARY), 3, VOCABULARY, 400)
    assert (logits.dtype, logits.device.type, len(logits)) == (torch.float32, "cpu", 2)
    assert not heads.deferral_stats.materialized


def test_logits_that_were_read_are_fused_afterwards_and_those_written_to_are_not():
    heads = Heads()
    logits = heads.deferring(heads.hidden)
    assert logits.argmax(-1).shape == (2, 5)
    shifted(logits)
    assert heads.deferral_stats.fused == 1
    logits.detach().mul_(0.5)
    shifted(logits)
    assert heads.deferral_stats.fused == 1
    assert sum(heads.deferral_stats.materialized.values()) == 1


def test_saving_copying_and_converting_work():
    heads = Heads()
    expected = heads.head(heads.hidden).detach()
    buffer = io.BytesIO()
    torch.save(heads.deferring(heads.hidden).detach(), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), expected)
    assert torch.equal(torch.from_numpy(heads.deferring(heads.hidden).detach().numpy()), expected)
    assert torch.equal(copy.deepcopy(heads.deferring(heads.hidden).detach()), expected)
    assert heads.deferring(heads.hidden).tolist() == expected.tolist()
    assert heads.deferring(heads.hidden).topk(3).indices.equal(expected.topk(3).indices)


def test_a_hook_on_logits_sees_their_gradient():
    heads, seen = Heads(), []
    logits = heads.deferring(heads.hidden)
    logits.register_hook(lambda gradient: seen.append(gradient.shape))
    shifted(logits).backward()
    assert seen == [(2, 5, VOCABULARY)]


def test_logits_read_after_their_weight_changed_raise_and_say_what_to_do():
    heads = Heads()
    logits = heads.deferring(heads.hidden)
    with torch.no_grad():
        heads.head.weight.add_(1.0)
    with pytest.raises(fastlora.FastLoRAError, match="defer_logits=False"):
        logits.sum()
    with pytest.raises(fastlora.FastLoRAError, match="modified in place"):
        shifted(logits)


def test_without_gradients_or_with_hooks_the_head_is_called_as_it_is():
    heads = Heads()
    with torch.no_grad():
        assert type(heads.deferring(heads.hidden)) is torch.Tensor
    heads.head.register_forward_hook(lambda module, inputs, output: output * 2)
    assert torch.equal(heads.deferring(heads.hidden), heads.head(heads.hidden))


def test_only_plain_linear_heads_on_a_vocabulary_defer():
    class Special(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2.0

    assert deferral_problem(nn.Linear(8, 40)) is None
    assert deferral_problem(nn.Linear(40, 8)) is not None
    assert deferral_problem(Special(8, 40)) is not None
    assert deferral_problem(None) is not None


def test_a_second_backward_through_the_loss_gives_the_same_gradients():
    heads = Heads()
    loss = shifted(heads.deferring(heads.hidden))
    first = torch.autograd.grad(loss, heads.hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, heads.hidden)[0])


def test_compiled_consumers_get_ordinary_logits():
    heads = Heads()
    assert_same(heads.both(torch.compile(shifted, backend="eager")))


def test_below_the_function_overrides_logits_have_their_gradients():
    def use(z):
        with torch._C.DisableTorchFunctionSubclass():
            return torch.add(F.cross_entropy(z.view(-1, VOCABULARY), LABELS.view(-1)), z.square().mean())

    heads = Heads()
    assert isinstance(heads.deferring(heads.hidden), DeferredLogits)
    assert_same(heads.both(use))


@pytest.mark.parametrize("kind", [DeferredLogits, DeferredGradient])
def test_a_deferred_tensor_hides_no_method_of_tensors(kind):
    own = {name for name in (*vars(kind), *vars(kind.__base__), *kind.__annotations__) if not name.startswith("__")}
    assert not own & set(dir(torch.Tensor)) - {"_overrides"}


def test_a_row_by_a_number_in_a_tensor_is_a_view():
    def use(z):
        row = z[torch.tensor(1)]
        row.mul_(2.0)
        z[:, torch.tensor(0)].zero_()
        return shifted(z) + row.square().mean()

    assert_same(Heads().both(use))


def test_what_is_handed_out_of_a_gradient_is_nobody_elses():
    def use(z):
        def clipped(g):
            total = g.flatten(0, 1).sum(0)
            total /= 100 * total.norm()

        z.register_hook(clipped)
        return shifted(z)

    assert_same(Heads(bias=True).both(use))
    kept = []
    for head in ("head", "deferring"):
        heads = Heads()
        logits = getattr(heads, head)(heads.hidden)
        first, second = logits[:, :3], logits[:, 1:]
        loss = sum(
            F.cross_entropy(z.reshape(-1, VOCABULARY), LABELS[:, : z.shape[1]].reshape(-1)) for z in (first, second)
        )
        of_second, of_all = torch.autograd.grad(loss, [second, logits])
        of_second.zero_()
        kept.append(of_all + 0)
    assert relative(kept[1], kept[0]) < 1e-6


REFUSED = {
    "resize_": lambda z: z.detach().resize_(2, 3),
    "transpose_": lambda z: z.detach().transpose_(0, 1),
    "squeeze_": lambda z: z.detach()[None].squeeze_(0),
    "data": lambda z: setattr(z, "data", torch.ones(2, 5, VOCABULARY)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_changes_of_shape_in_place_are_refused(name):
    heads = Heads()
    with pytest.raises(fastlora.FastLoRAError, match="defer_logits=False"):
        REFUSED[name](heads.deferring(heads.hidden))


def test_writes_past_pytorchs_operations_are_found_when_logits_are_read_late():
    heads = Heads()
    logits = heads.deferring(heads.hidden)
    shifted(logits).backward()
    heads.head.weight.data.mul_(1.5)
    with pytest.raises(fastlora.FastLoRAError, match="modified in place"):
        logits.sum()
    with pytest.raises(fastlora.FastLoRAError, match="modified in place"):
        shifted(logits)


def test_labels_and_indices_may_be_reused_at_once():
    labels, rows = LABELS.clone(), torch.tensor([0, 2])

    def use(z):
        labels.copy_(LABELS)
        rows.copy_(torch.tensor([0, 2]))
        picked = z[:, rows].square().sum()
        rows.fill_(1)
        return picked + shifted(z, LABELS)

    heads = Heads()
    logits = heads.deferring(heads.hidden)
    logits.retain_grad()
    F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1)).backward()
    labels.zero_()
    ordinary = heads.head(heads.hidden)
    expected = torch.autograd.grad(F.cross_entropy(ordinary.view(-1, VOCABULARY), LABELS.view(-1)), ordinary)[0]
    assert relative(logits.grad + 0, expected) < 1e-6
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Heads().both(use)


def test_a_gradient_that_is_pulled_back_twice_is_two_tensors():
    heads = Heads()
    logits = heads.deferring(heads.hidden)
    (gradient,) = torch.autograd.grad(shifted(logits), logits, retain_graph=True)
    (first,) = torch.autograd.grad(logits, heads.hidden, gradient, retain_graph=True)
    kept = first.clone()
    first.zero_()
    assert relative(torch.autograd.grad(logits, heads.hidden, gradient)[0], kept) < 1e-6


def test_second_derivatives_through_own_losses_are_eagers():
    def use(z):
        (gradient,) = torch.autograd.grad(z.square().sum(), z, create_graph=True)
        return (gradient * z).sum() + gradient.pow(3).mean()

    assert_same(Heads().both(use), bound=1e-5)


def test_hooks_see_tensors_that_can_be_read():
    seen = []
    heads = Heads()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (seen.append(t.detach().numpy().copy()), t)[1], lambda t: t
    ):
        logits = heads.deferring(heads.hidden)
        loss = (logits * logits).sum()
    logits.register_hook(lambda g: seen.append(g.detach().numpy().copy()))
    logits.backward(torch.ones_like(logits), retain_graph=True)
    loss.backward()
    assert all(array.any() for array in seen)
    assert len(seen) >= 4


def test_modes_and_parametrizations_see_the_heads_product():
    class Doubled(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return result * 2 if func is F.linear else result

    heads = Heads()
    with Doubled():
        found, expected = heads.deferring(heads.hidden), heads.head(heads.hidden)
    assert type(found) is torch.Tensor
    assert torch.equal(found, expected)
    nn.utils.parametrizations.spectral_norm(heads.head)
    assert type(heads.deferring(heads.hidden)) is torch.Tensor


def test_tensors_that_a_linear_layer_refuses_are_refused():
    heads = Heads()
    for wrong in (
        torch.randn(2, WIDTH, dtype=torch.bfloat16, requires_grad=True),
        torch.randn(2, 3, requires_grad=True),
    ):
        with pytest.raises(RuntimeError):
            heads.deferring(wrong)


def test_autocast_leaves_float64_as_it_is():
    heads = Heads(dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert heads.deferring(heads.hidden).dtype is heads.head(heads.hidden).dtype is torch.float64


def test_a_gradient_for_logits_is_not_computed_of_weights_that_have_changed():
    heads = Heads()
    logits = heads.deferring(heads.hidden)
    logits.retain_grad()
    shifted(logits).backward()
    torch.optim.SGD(heads.head.parameters(), lr=1.0).step()
    with pytest.raises(fastlora.FastLoRAError, match="modified in place"):
        logits.grad.norm()
