"""Experts, or other grouped layers, with LoRA, without merging the adapters into the weights.

    W' = W + s (left @ right)                        one matrix for each of E experts
    y_t = x_t W'_e^T                                 for the tokens t of expert e, which are sorted by expert

is what PEFT and transformers compute: they materialize W' in every forward, and its gradient in every backward though W
is frozen. Here nothing of W's size is materialized:

    xa_t = x_t A_e^T        y_t = x_t W_e^T + s xa_t B_e^T

Backward, dxa being only R wide, each product over the rows of an expert:

    dxa = s dy B        dB = dy^T (s xa)        dA = dxa^T x        dx = dy W + dxa A        dW = dy^T x

Matrices have one of two layouts. With `out_first`, W is (E, N, K), left is B, (E, N, R), and right is A, (E, R, K);
otherwise each is transposed: W is (E, K, N), left is A^T, (E, K, R), and right is B^T, (E, R, N).

Rounding: eager rounds W'; here xa is rounded, and y once more after its first product. All operands have the same
dtype. An expert without tokens has gradients of zeros, as in eager.

Saved: s xa, one row of R per token, if B is trained; x if A or W is. In float16 a scaling above 1 is applied to dB
instead, as in `lora_linear.py`.

Shapes: x (T, K), y (T, N), offs (E,), the ends of the experts' tokens, int32 or int64. Rows from the last offset on are
in no group: those of y and of dx are zero with `zero_rest`, otherwise undefined (`grouped_mm.py`).
Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), and first principles.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.kernels.core import grouped_mm
from fastlora.kernels.core.cost import Cost, Work
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.grouped_mm import Groups
from fastlora.kernels.core.library import register_op
from fastlora.kernels.core.semantic_op import Policy
from fastlora.kernels.formulas.lora_linear import b_scaling, xa_scaling


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    offs: torch.Tensor,
    scaling: float,
    out_first: bool,
    zero_rest: bool,
) -> torch.Tensor:
    """Compute the adapted experts as PEFT and transformers do. Return y of shape (T, N), zero in rows of no group."""
    total = torch.baddbmm(weight, left, right, alpha=scaling)
    return grouped_mm.reference(x, total.mT if out_first else total, offs)


def _check(x: torch.Tensor, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, offs: torch.Tensor) -> None:
    """Check dimensions and dtypes; the values of offs are not checked.

    Raises:
        ValueError: if dimensions or dtypes do not match.
    """
    if x.dim() != 2 or offs.dim() != 1 or any(t.dim() != 3 for t in (weight, left, right)):
        raise ValueError("x has to be (T, K), offs (E,), and weight, left and right three-dimensional")
    if offs.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offs has to be int32 or int64, not {offs.dtype}")
    if offs.shape[0] != weight.shape[0]:
        raise ValueError(f"offs has {offs.shape[0]} ends for {weight.shape[0]} experts")
    if len(dtypes := {t.dtype for t in (x, weight, left, right)}) > 1:
        raise ValueError(f"x, weight, left and right have to be of one dtype, not {sorted(map(str, dtypes))}")


def _factors(left: torch.Tensor, right: torch.Tensor, out_first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A (E, R, K) and B (E, N, R)."""
    return (right, left) if out_first else (left.mT, right.mT)


def _names(out_first: bool) -> tuple[str, str]:
    """Return the names of the arguments that hold A and B."""
    return ("right", "left") if out_first else ("left", "right")


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    offs: torch.Tensor,
    scaling: float,
    out_first: bool,
    zero_rest: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(x, weight, left, right, offs)
    groups = Groups(offs, x, zero_rest)
    a, b = _factors(left, right, out_first)
    xa = groups.product(x, a.mT)
    y = groups.product(x, weight.mT if out_first else weight)
    y = groups.add_product(y, xa, b.mT, alpha=scaling)
    return y, xa * xa_scaling(scaling, x.dtype)


def backward(
    wanted: Wanted,
    grads: list[torch.Tensor],
    x: torch.Tensor | None,
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    offs: torch.Tensor,
    xa: torch.Tensor | None,
    scaling: float,
    out_first: bool,
    zero_rest: bool,
    **_: Any,
) -> Gradients:
    dy = grads[0]
    groups = Groups(offs, dy, zero_rest)
    a, b = _factors(left, right, out_first)
    name_a, name_b = _names(out_first)
    gradients: Gradients = {}

    def outer(out_side: torch.Tensor, in_side: torch.Tensor | None, alpha: float = 1.0) -> torch.Tensor:
        assert in_side is not None
        return groups.outer(out_side, in_side, alpha) if out_first else groups.outer(in_side, out_side, alpha)

    if wanted["weight"]:
        gradients["weight"] = outer(dy, x)
    if wanted[name_b]:
        gradients[name_b] = outer(dy, xa, b_scaling(scaling, dy.dtype))
    if not (wanted[name_a] or wanted["x"]):
        return gradients
    dxa = groups.product(dy, b, alpha=scaling)
    if wanted[name_a]:
        gradients[name_a] = outer(dxa, x)
    if wanted["x"]:
        dx = groups.product(dy, weight if out_first else weight.mT)
        gradients["x"] = groups.add_product(dx, dxa, a)
    return gradients


lora_experts = register_op(
    "lora_experts",
    family="lora",
    schema=(
        "(Tensor x, Tensor weight, Tensor left, Tensor right, Tensor offs, float scaling, bool out_first, "
        "bool zero_rest) -> (Tensor y, Tensor xa)"
    ),
    outputs=1,
    reference=reference,
    forward=forward,
    backward=backward,
    saves=("x", "weight", "left", "right", "offs", "xa"),
    saved_if={
        "x": lambda wanted, given: wanted["weight"] or wanted[_names(given["out_first"])[0]],
        "xa": lambda wanted, given: wanted[_names(given["out_first"])[1]],
    },
    policy=Policy(outputs_mutable=True, samples={"offs": grouped_mm.even_ends}),
    cost=Cost(
        forward=Work(flops="2*T*N*K + 2*T*R*(N + K)", bytes="(T*K + T*N + T*R)*b + M*(N*K*w + R*(N + K)*p)"),
        backward=Work(flops="2*T*N*K + 4*T*R*(N + K)", bytes="(2*T*K + T*N + T*R)*b + M*(N*K*w + 2*R*(N + K)*p)"),
    ),
)
