"""Ops whose PyTorch implementation depends on values are not replayed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_cases import flat
from test_call_site import assert_equal, small_layer

from fastlora.kernels import register_op
from fastlora.kernels.core.call_site import call_site
from fastlora.kernels.core.semantic_op import DerivedArgument, Policy


def norm_by_value(name: str, **options: Any) -> Any:
    """Return an op whose PyTorch implementation reads values: x / max|x|."""

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        largest = max(x.abs().flatten().tolist())
        return x * (1 / largest), x.new_full((1,), largest)

    return register_op(
        name,
        family="norm",
        schema="(Tensor x) -> (Tensor y, Tensor largest)",
        outputs=1,
        reference=lambda x: x / x.abs().max(),
        forward=forward,
        backward=lambda wanted, grads, x, largest: {"x": grads[0] / largest},
        saves=("x", "largest"),
        **options,
    )


@pytest.mark.pytorch_only
def test_a_replay_holds_no_value_of_a_recomputed_argument() -> None:
    norm = norm_by_value("norm_by_value", policy=Policy(recompute_from=(None, {})))
    calls, derived = small_layer(), DerivedArgument("x", None, norm)
    names = calls.op.names
    x, y = torch.randn(2, 3, requires_grad=True), calls.given["x"]
    site, given = call_site(calls.op, [calls.given[n] for n in names], [(derived, [x])])
    assert given[-1] is x
    for scale in (1.0, 2.0, 3.0, 4.0):
        source = (torch.randn(y.shape) * scale).requires_grad_()
        normed = norm(x=source)
        outputs = site(*(normed if t is y else source if t is x else t for t in given))
        inputs = [t for n, t in calls.inputs.items() if n != "x"]
        expected = calls.op(**calls.given | {"x": normed})
        assert_equal(
            list(torch.autograd.grad(flat(outputs)[0].sum(), inputs, retain_graph=True)),
            list(torch.autograd.grad(flat(expected)[0].sum(), inputs, retain_graph=True)),
        )


@pytest.mark.pytorch_only
def test_saved_tensors_are_identified_by_name() -> None:
    """An implementation may return its argument in one call, and a new tensor in another."""

    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = x if bool((x >= 0).all()) else x.clamp(min=0)
        return h * h, h

    op = register_op(
        "clamped_square",
        family="glu",
        schema="(Tensor x) -> (Tensor y, Tensor h)",
        outputs=1,
        reference=lambda x: x.clamp(min=0) ** 2,
        forward=forward,
        backward=lambda wanted, grads, h: {"x": 2 * h * grads[0]},
        saves=("h",),
    )
    site, _ = call_site(op, [torch.empty(4)])
    for values in ([1.0, 2.0, 3.0, 4.0], [1.0, -2.0, 3.0, -4.0]):
        x = torch.tensor(values, requires_grad=True)
        found, expected = (torch.autograd.grad(y.sum(), x)[0] for y in (site(x)[0], op(x=x)))
        assert torch.equal(found, expected)
