"""Deferred logits behave like ordinary tensors: views, writes, hooks, copies, gradients and errors."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from deferred_heads import LABELS, VOCABULARY, Heads, assert_same, shifted
from tiny_models import relative

import fastlora
from fastlora.logits.deferred_logits import DeferredGradient, DeferredLogits


def test_writes_to_logits_reach_views_but_not_copies():
    def use(z):
        view, copied = z.view(-1, VOCABULARY), z.double()
        z[..., 3] = 9.0
        z.mul_(2.0)
        return shifted(z).double() + F.cross_entropy(view, LABELS.view(-1)).double() + copied.square().mean()

    assert_same(Heads().both(use))


def test_detached_logits_have_no_gradient():
    heads = Heads()
    logits = heads.deferred_head(heads.hidden)
    cut = logits.detach()
    assert not cut.requires_grad
    assert logits.requires_grad
    assert not F.cross_entropy(cut.view(-1, VOCABULARY), LABELS.view(-1)).requires_grad


def test_reading_metadata_does_not_materialize():
    heads = Heads()
    logits = heads.deferred_head(heads.hidden)
    assert isinstance(logits, torch.Tensor)
    assert (logits.shape, logits.ndim, logits.size(-1), logits.numel()) == ((2, 5, VOCABULARY), 3, VOCABULARY, 400)
    assert (logits.dtype, logits.device.type, len(logits)) == (torch.float32, "cpu", 2)
    assert not heads.deferral_stats.materialized


def test_logits_can_be_saved_copied_and_converted():
    heads = Heads()
    expected = heads.head(heads.hidden).detach()
    buffer = io.BytesIO()
    torch.save(heads.deferred_head(heads.hidden).detach(), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), expected)
    assert torch.equal(torch.from_numpy(heads.deferred_head(heads.hidden).detach().numpy()), expected)
    assert torch.equal(copy.deepcopy(heads.deferred_head(heads.hidden).detach()), expected)
    assert heads.deferred_head(heads.hidden).tolist() == expected.tolist()
    assert heads.deferred_head(heads.hidden).topk(3).indices.equal(expected.topk(3).indices)


def test_a_hook_on_logits_sees_their_gradient():
    heads, seen = Heads(), []
    logits = heads.deferred_head(heads.hidden)
    logits.register_hook(lambda gradient: seen.append(gradient.shape))
    shifted(logits).backward()
    assert seen == [(2, 5, VOCABULARY)]


def test_reading_logits_after_a_weight_update_raises():
    heads = Heads()
    logits = heads.deferred_head(heads.hidden)
    with torch.no_grad():
        heads.head.weight.add_(1.0)
    with pytest.raises(fastlora.FastLoRAError, match="defer_logits=False"):
        logits.sum()
    with pytest.raises(fastlora.FastLoRAError, match="modified in place"):
        shifted(logits)


def test_a_second_backward_through_the_loss_gives_the_same_gradients():
    heads = Heads()
    loss = shifted(heads.deferred_head(heads.hidden))
    first = torch.autograd.grad(loss, heads.hidden, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, heads.hidden)[0])


def test_gradients_are_right_with_function_overrides_disabled():
    def use(z):
        with torch._C.DisableTorchFunctionSubclass():
            return torch.add(F.cross_entropy(z.view(-1, VOCABULARY), LABELS.view(-1)), z.square().mean())

    heads = Heads()
    assert isinstance(heads.deferred_head(heads.hidden), DeferredLogits)
    assert_same(heads.both(use))


@pytest.mark.parametrize("kind", [DeferredLogits, DeferredGradient])
def test_deferred_tensors_hide_no_tensor_attribute(kind):
    own = {name for name in (*vars(kind), *vars(kind.__base__), *kind.__annotations__) if not name.startswith("__")}
    assert not own & set(dir(torch.Tensor)) - {"_overrides"}


def test_indexing_with_a_scalar_tensor_returns_a_view():
    def use(z):
        row = z[torch.tensor(1)]
        row.mul_(2.0)
        z[:, torch.tensor(0)].zero_()
        return shifted(z) + row.square().mean()

    assert_same(Heads().both(use))


def test_gradients_of_parameters_share_no_memory():
    def use(z):
        def clipped(g):
            total = g.flatten(0, 1).sum(0)
            total /= 100 * total.norm()

        z.register_hook(clipped)
        return shifted(z)

    assert_same(Heads(bias=True).both(use))
    kept = []
    for head in ("head", "deferred_head"):
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
def test_in_place_resizing_is_refused(name):
    heads = Heads()
    with pytest.raises(fastlora.FastLoRAError, match="defer_logits=False"):
        REFUSED[name](heads.deferred_head(heads.hidden))


def test_writes_that_bypass_version_counters_are_detected():
    heads = Heads()
    logits = heads.deferred_head(heads.hidden)
    shifted(logits).backward()
    heads.head.weight.data.mul_(1.5)
    with pytest.raises(fastlora.FastLoRAError, match="modified in place"):
        logits.sum()
    with pytest.raises(fastlora.FastLoRAError, match="modified in place"):
        shifted(logits)


def test_labels_and_indices_may_be_overwritten_after_use():
    labels, rows = LABELS.clone(), torch.tensor([0, 2])

    def use(z):
        labels.copy_(LABELS)
        rows.copy_(torch.tensor([0, 2]))
        picked = z[:, rows].square().sum()
        rows.fill_(1)
        return picked + shifted(z, LABELS)

    heads = Heads()
    logits = heads.deferred_head(heads.hidden)
    logits.retain_grad()
    F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1)).backward()
    labels.zero_()
    ordinary = heads.head(heads.hidden)
    expected = torch.autograd.grad(F.cross_entropy(ordinary.view(-1, VOCABULARY), LABELS.view(-1)), ordinary)[0]
    assert relative(logits.grad + 0, expected) < 1e-6
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        Heads().both(use)


def test_two_backwards_of_a_gradient_share_no_memory():
    heads = Heads()
    logits = heads.deferred_head(heads.hidden)
    (gradient,) = torch.autograd.grad(shifted(logits), logits, retain_graph=True)
    (first,) = torch.autograd.grad(logits, heads.hidden, gradient, retain_graph=True)
    kept = first.clone()
    first.zero_()
    assert relative(torch.autograd.grad(logits, heads.hidden, gradient)[0], kept) < 1e-6


def test_second_derivatives_of_unfused_losses_equal_eager():
    def use(z):
        (gradient,) = torch.autograd.grad(z.square().sum(), z, create_graph=True)
        return (gradient * z).sum() + gradient.pow(3).mean()

    assert_same(Heads().both(use), bound=1e-5)


def test_saved_tensor_hooks_can_read_logits():
    seen = []
    heads = Heads()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (seen.append(t.detach().numpy().copy()), t)[1], lambda t: t
    ):
        logits = heads.deferred_head(heads.hidden)
        loss = (logits * logits).sum()
    logits.register_hook(lambda g: seen.append(g.detach().numpy().copy()))
    logits.backward(torch.ones_like(logits), retain_graph=True)
    loss.backward()
    assert all(array.any() for array in seen)
    assert len(seen) >= 4


def test_a_logits_gradient_after_a_weight_update_raises():
    heads = Heads()
    logits = heads.deferred_head(heads.hidden)
    logits.retain_grad()
    shifted(logits).backward()
    torch.optim.SGD(heads.head.parameters(), lr=1.0).step()
    with pytest.raises(fastlora.FastLoRAError, match="modified in place"):
        logits.grad.norm()
