"""Dropout whose mask is computed from a seed and the index of an element, so that it need not be saved:

    z = x * m (+ base)        m_i = 1 / (1 - p) if r_i >= p 2^32, else 0        r_i = random(seed, i), 32 bits

i is an element's index in row-major order, independent of its strides.  r_i is word i mod 4 of the output of the
counter-based generator Philox-4x32-10 for the counter i div 4 and the key `seed`: ten rounds of

    c0, c1, c2, c3 = hi(B c2) ^ c1 ^ k0,  lo(B c2),  hi(A c0) ^ c3 ^ k1,  lo(A c0)        k0 += U,  k1 += V

on words of 32 bits, where hi and lo are the halves of a product.  The counter's words are the low and the high half of
i div 4, then zeros, and the key's are those of the seed.

Backward.  Dropout is linear and self-adjoint:

    dx = dz * m        dbase = dz

so the backward recomputes the mask, and with `base` adds the masked gradient to another one in one pass.

Saved: the seed.  m and x * m are computed in float32 (1 / (1 - p) from a rounded 1 - p, as in PyTorch) and rounded
once, so z equals PyTorch's dropout for the same mask; 0 times inf or nan is nan in both.

Shapes: x, base and z (T, K) or any other; seed one int64.
Sources: Srivastava et al., "Dropout" (2014); Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch

from fastlora.compat.calls import is_fake
from fastlora.kernels.core.cost import Cost, Work
from fastlora.kernels.core.devices import computes, runs_kernels
from fastlora.kernels.core.gradients import Gradients, Wanted
from fastlora.kernels.core.library import register_op

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_INCREMENTS = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF
SEEDS = 2**63 - 1
"""Seeds are drawn from [0, SEEDS)."""

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def philox(counter: Words, key: tuple[torch.Tensor, torch.Tensor], rounds: int = 10) -> Words:
    """Compute Philox-4x32: four random words for each counter. All words are int64 tensors of values below 2^32."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    a, b = _MULTIPLIERS
    for _ in range(rounds):
        left, right = c0 * a, c2 * b  # modulo 2^64; shifted and masked below as if unsigned
        c0 = ((right >> 32) & _WORD) ^ c1 ^ k0
        c2 = ((left >> 32) & _WORD) ^ c3 ^ k1
        c1, c3 = right & _WORD, left & _WORD
        k0, k1 = (k0 + _INCREMENTS[0]) & _WORD, (k1 + _INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def random_words(seed: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Return r of the module's docstring for each index `position`, both int64."""
    counter, zero = position >> 2, torch.zeros_like(position)
    key = seed & _WORD, (seed >> 32) & _WORD
    first, second, third, fourth = philox((counter & _WORD, counter >> 32, zero, zero), key)
    even, odd = (torch.where(position & 2 == 0, *pair) for pair in ((first, third), (second, fourth)))
    return torch.where(position & 1 == 0, even, odd)


def threshold(p: float) -> int:
    """Return the number below which a random word drops its element."""
    return round(p * 2**32)


def inverse(p: float) -> float:
    """Return 1 / (1 - p), computed in float32."""
    return ctypes.c_float(1 / ctypes.c_float(1 - p).value).value


def check(x: torch.Tensor, base: torch.Tensor | None, seed: torch.Tensor, p: float) -> None:
    """Check the arguments of the op.

    Raises:
        ValueError: for a probability outside of [0, 1), a seed that is not one int64 on x's device, or a base of
        another
            shape.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout: p={p} has to be at least 0 and less than 1; a layer that drops all can be left out")
    if seed.dtype is not torch.int64 or seed.numel() != 1 or seed.device != x.device:
        found = f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
        wanted = f"one int64 on {x.device}: torch.randint({SEEDS}, (1,), device=x.device)"
        raise ValueError(f"dropout: the seed is {found}, and has to be {wanted}")
    if base is not None and base.shape != x.shape:
        raise ValueError(f"dropout: base has shape {tuple(base.shape)} and x {tuple(x.shape)}; they have to be equal")


def mask(like: torch.Tensor, seed: torch.Tensor, p: float, dtype: torch.dtype) -> torch.Tensor:
    """Return m in `dtype`, in the shape of `like` and on its device."""
    if is_fake(like):  # only the shape matters, and the rounds are a hundred operators
        return like.new_empty(like.shape, dtype=dtype)
    words = random_words(seed.reshape(1), torch.arange(like.numel(), device=like.device))
    factor = inverse(p) if dtype is torch.float32 else 1 / (1 - p)
    return ((words >= threshold(p)).to(dtype) * factor).reshape(like.shape)


def reference(
    x: torch.Tensor, base: torch.Tensor | None, seed: torch.Tensor, p: float, out_dtype: torch.dtype
) -> torch.Tensor:
    """Apply dropout with the mask of the seed, and add `base`. Return z of x's shape in `out_dtype`, contiguous."""
    check(x, base, seed, p)
    wide = torch.promote_types(x.dtype, torch.float32)
    if base is not None:
        wide = torch.promote_types(wide, base.dtype)
    z = x.contiguous().to(wide) * mask(x, seed, p, wide)
    return (z if base is None else z + base.contiguous()).to(out_dtype)


def forward(**arguments: Any) -> tuple[torch.Tensor]:
    return (reference(**arguments),)


def backward(
    wanted: Wanted, grads: list[torch.Tensor], seed: torch.Tensor, x_dtype: torch.dtype, p: float, **_: Any
) -> Gradients:
    return {"x": reference(grads[0], None, seed, p, x_dtype)} if wanted["x"] else {}


dropout = register_op(
    "dropout",
    family="dropout",
    schema="(Tensor x, Tensor? base, Tensor seed, float p, ScalarType out_dtype) -> (Tensor z)",
    outputs=1,
    reference=reference,
    forward=forward,
    backward=backward,
    saves=("x", "seed"),
    saved_if={"x": lambda *_: False},
    passthrough=("base",),
    cost=Cost(
        forward=Work(flops="2*T*K", bytes="2*T*K*b"),
        backward=Work(flops="2*T*K", bytes="2*T*K*b"),
    ),
)


def dropped_out(
    x: torch.Tensor,
    seed: torch.Tensor | None,
    p: float | None,
    dtype: torch.dtype,
    base: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return dropout of x (+ base) in `dtype`, for other ops; without a seed, x in `dtype`."""
    if seed is None or p is None:
        return x.to(dtype)
    return dropout.target(x, base, seed, p, dtype)


def check_argument(seed: torch.Tensor | None, p: float | None, x_dropped: torch.Tensor | None = None) -> None:
    """Check the dropout arguments of another op.

    Raises:
        ValueError: if only one of seed and p is given, or a seed together with `x_dropped`.
    """
    if (seed is None) != (p is None):
        raise ValueError(f"seed={seed} with dropout={p}: give both to drop out the input, or neither")
    if seed is not None and x_dropped is not None:
        raise ValueError("x_dropped with a seed: its dropout is done already, so leave out seed and dropout")


def is_cheap(t: torch.Tensor) -> bool:
    """Return whether a Triton kernel computes the masks of tensors like this; in PyTorch they are too slow."""
    if t.device.type != "cuda" or not runs_kernels(t.device):
        return False
    return computes(t.dtype, t.device)
