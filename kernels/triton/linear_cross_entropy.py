"""Cross-entropy of a linear head's logits: `kernels/formulas/linear_cross_entropy.py` has the formulas.

Kept tokens are moved first by a permutation that is computed on the device, and so is their count, without a
synchronization.  For each chunk of tokens, one product computes the logits, one kernel replaces them by dl in place,
and one product per gradient follows:

    rank_kernel             labels -> the number of kept labels up to each
    gather_kernel           x, labels -> the kept rows of x, in order, then zeros; and the permutation
    rows_product            logits = x W^T
    cross_entropy_kernel    logits -> loss, dl
    depth_product           dW += dl^T x
    rows_product            dx = dl W, overwriting the rows of x
    scatter_kernel          dx in token order

A row of logits is read twice, the second time from the L2 cache if all rows in flight fit there.  `rows_product` and
`depth_product` stop at the last kept row; dl W is split along K (`split_k.py`) if its tiles would not fill the GPU.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import FLOAT_DTYPES, processors, supported
from fastlora.kernels.core.implementations import with_strides_of
from fastlora.kernels.formulas import linear_cross_entropy as op
from fastlora.kernels.formulas.lm_head import PARAMETERS, Head, ParameterGradients, accumulate
from fastlora.kernels.triton.blocks import matmul, matmul_tiles, split_k
from fastlora.kernels.triton.blocks.compact_tokens import CompactedTokens
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import TL_DTYPES, cdiv, empty, power_of_two

CHUNK_BYTES, CHUNK_ROWS = 512 << 20, 1024
"""The maximum bytes of logits and tokens of a chunk: larger ones are not faster."""
CHUNK_FRACTION = 0.6
"""Logits may also take this fraction of the bytes of the head's gradient, which is read and written once per chunk."""
CHUNK_MICROSECONDS = 30.0
"""Overhead of a chunk: kernel launches and tails."""
FEW_ROWS = 512
"""Up to this many rows little can be skipped, and cuBLAS is faster where it supports the operands: it splits K."""
MAX_BFLOAT16_ADDENDS = 8
"""The most chunks that accumulate in bfloat16; more accumulate in float32."""
MAX_BLOCK = 8192
"""Logits of a row that a program loads at a time; twice as many if there are fewer rows than SMs, so that rows in
flight stay in the cache until they are read again. Measured on an H200, bfloat16."""


@triton.jit
def _tanh(u):
    """Return tanh(u), near 0 by an odd polynomial, since 1 - 2 / (exp(2u) + 1) cancels there."""
    s = u * u
    p = (((-0.005515176337 * s + 0.0204694327) * s - 0.05368802697) * s + 0.13330830634) * s - 0.3333325982
    return tl.where(tl.abs(u) < 0.65, u + u * s * p, 1.0 - 2.0 / (tl.exp(2.0 * u) + 1.0))


@triton.jit
def _cap(logits, scale, softcap, CAPPED: tl.constexpr, LOGITS_DTYPE: tl.constexpr):
    """Return z and dz/dl, without the factor scale, from the head's output l."""
    z = logits.to(tl.float32).to(LOGITS_DTYPE).to(tl.float32) * scale
    slope = 1.0
    if CAPPED:
        t = _tanh(z / softcap)
        z = softcap * t
        slope = 1.0 - t * t
    return z, slope


@triton.jit
def _log_sum_exp(
    row_ptr, V, width, scale, softcap,
    SUM: tl.constexpr, CAPPED: tl.constexpr, LOGITS_DTYPE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Return max(z), sum(exp(z - max)) and, if SUM, sum(z) of a row.

    Each of LANES lanes accumulates over its own WIDTH columns of every block; lanes are combined at the end.
    """
    lanes, offsets = tl.arange(0, LANES)[:, None] * WIDTH, tl.arange(0, WIDTH)[None, :]
    peak = tl.full((LANES,), float("-inf"), tl.float32)
    exp_sum = tl.zeros((LANES,), tl.float32)
    z_sum = tl.zeros((LANES,), tl.float32)
    for start in range(0, V, LANES * WIDTH):
        cols = start + lanes + offsets
        mask = cols < V
        logits = tl.load(row_ptr + cols, mask=cols < width, other=0.0, eviction_policy="evict_last")
        z, _ = _cap(logits, scale, softcap, CAPPED, LOGITS_DTYPE)
        if SUM:
            z_sum += tl.sum(tl.where(mask, z, 0.0), axis=1)
        z = tl.where(mask, z, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(z, axis=1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # -inf - -inf would be nan
        exp_sum = exp_sum * tl.exp(peak - base) + tl.sum(tl.exp(z - base[:, None]), axis=1)
        peak = new_peak
    row_peak = tl.max(peak, axis=0)
    exp_sum = tl.where(peak == float("-inf"), 0.0, exp_sum * tl.exp(peak - row_peak))
    return row_peak, tl.sum(exp_sum, axis=0), tl.sum(z_sum, axis=0)


@precompile.kernel(do_not_specialize_on_alignment=["remaining_ptr"])
def cross_entropy_kernel(
    logits_ptr, labels_ptr, order_ptr, remaining_ptr, g_ptr, loss_ptr,
    V, logits_stride, scale, softcap, smoothing, z_loss,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, EACH: tl.constexpr, GRADIENT: tl.constexpr, CLEAR: tl.constexpr,
    LOGITS_DTYPE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store the loss of one row of logits and, if GRADIENT, overwrite the logits with dl.

    EACH: g has a value per token. Rows from `remaining` on are ignored tokens: their loss is 0; their dl is 0 if CLEAR,
    otherwise unused. logits_stride is a multiple of 16, and rows are read and written including their padding, so that
    accesses are vectorized for any V.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(order_ptr + row)
    row_ptr = logits_ptr + row * logits_stride
    if row >= tl.load(remaining_ptr):
        tl.store(loss_ptr + token, 0.0)
        if CLEAR:
            lane = tl.arange(0, LANES * WIDTH)
            for first in range(0, V, LANES * WIDTH):
                zeros = tl.zeros((LANES * WIDTH,), logits_ptr.dtype.element_ty)
                tl.store(row_ptr + first + lane, zeros, mask=first + lane < logits_stride)
        return
    label = tl.load(labels_ptr + token)
    logit = tl.load(row_ptr + label, mask=(label >= 0) & (label < V), other=0.0)
    z_label, _ = _cap(logit, scale, softcap, CAPPED, LOGITS_DTYPE)
    peak, exp_sum, z_sum = _log_sum_exp(
        row_ptr, V, logits_stride, scale, softcap, SMOOTHED, CAPPED, LOGITS_DTYPE, LANES, WIDTH
    )
    log_sum = tl.log(exp_sum)
    loss = log_sum + (peak - z_label)
    if SMOOTHED:
        loss = (1.0 - smoothing) * loss + smoothing * (log_sum + (peak - z_sum / V))
    lse = peak + log_sum
    tl.store(loss_ptr + token, loss + z_loss * lse * lse)
    if GRADIENT:
        factor = scale * tl.load(g_ptr + (token if EACH else 0))
        weight = (1.0 + 2.0 * z_loss * lse) / exp_sum
        lanes, offsets = tl.arange(0, LANES)[:, None] * WIDTH, tl.arange(0, WIDTH)[None, :]
        tl.debug_barrier()  # all logits have to be read before any is overwritten
        for first in range(0, V, LANES * WIDTH):
            cols = first + lanes + offsets
            mask = cols < logits_stride
            logits = tl.load(row_ptr + cols, mask=mask, other=0.0, eviction_policy="evict_first")
            z, slope = _cap(logits, scale, softcap, CAPPED, LOGITS_DTYPE)
            dz = tl.exp(z - peak) * weight - smoothing / V - tl.where(cols == label, 1.0 - smoothing, 0.0)
            dl = dz * slope * factor
            tl.store(row_ptr + cols, dl.to(logits_ptr.dtype.element_ty), mask=mask)


@precompile.kernel()
def multiply_kernel(
    t_ptr, g_ptr, labels_ptr, y_ptr, N, H, ignore_index,
    EACH: tl.constexpr, ROWS: tl.constexpr, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y = t * g, for BLOCK of N elements.

    EACH: g has a value per H elements. ROWS: y is 0 where the label of these is ignored. IN_PLACE: y is t, so there is
    nothing to do if g is 1.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    g = tl.load(g_ptr + at // H, mask=mask, other=0.0) if EACH else tl.load(g_ptr)
    if IN_PLACE and not EACH:  # noqa: SIM102  (the outer condition is a constexpr)
        if g == 1.0:
            return
    t = tl.load(t_ptr + at, mask=mask, other=0.0).to(tl.float32) * g
    if ROWS:
        t = tl.where(tl.load(labels_ptr + at // H, mask=mask, other=0) == ignore_index, 0.0, t)
    tl.store(y_ptr + at, t.to(y_ptr.dtype.element_ty), mask=mask)


# ---- products


def _rows_are_aligned(t: torch.Tensor) -> bool:
    return t.shape[1] * t.itemsize % 16 == 0


def rows_product(left: torch.Tensor, right: torch.Tensor, remaining: torch.Tensor, out: torch.Tensor) -> None:
    """Write left[:remaining] @ right to out[:remaining]; other rows of `out` are undefined."""
    few = left.shape[0] < FEW_ROWS and _rows_are_aligned(out)
    if few or matmul.supports([(left, right)], out=out) is not True:
        torch.mm(left, right, out=out)
    elif left.stride(1) == 1 and (splits := split_k.plan(len(out), out.shape[1], left.shape[1], out.device)[0]) > 1:
        split_k.limited_rows(left, right, remaining, out, splits)
    else:
        matmul.limited_rows(left, right, remaining, out)


def depth_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, remaining: torch.Tensor, beta: float
) -> None:
    """Update total = beta * total + left[:remaining]^T @ right[:remaining]; both are 0 in rows from `remaining` on."""
    few = 1 < left.shape[0] <= FEW_ROWS and _rows_are_aligned(total)
    if not few and matmul.supports([(left.t(), right)], out=total) is True:
        matmul.limited_depth(left.t(), right, remaining, total, add=beta != 0)
    else:
        accumulate(total, left.t(), right, beta)


class LimitedSums(ParameterGradients):
    """Parameter gradients summed over the `remaining` kept tokens of each chunk."""

    remaining: torch.Tensor

    def add_weight(self, total: torch.Tensor, dl: torch.Tensor, x: torch.Tensor, beta: float) -> None:
        depth_product(total, dl, x, self.remaining, beta)


def _write_logits(
    head: Head, x: torch.Tensor, xa: torch.Tensor | None, remaining: torch.Tensor, out: torch.Tensor
) -> None:
    base = out if out.dtype == head.base_dtype else torch.empty_like(out, dtype=head.base_dtype)
    if head.bias is None:
        rows_product(x.to(head.base_dtype), head.weight.t(), remaining, base)
    else:
        torch.addmm(head.bias, x.to(head.base_dtype), head.weight.t(), out=base)
    if base is not out:
        out.copy_(base)
    if xa is not None and head.lora_b is not None:
        accumulate(out, xa, head.lora_b.t(), alpha=head.scaling)


def _write_input_gradient(
    head: Head, dl: torch.Tensor, dxa: torch.Tensor | None, remaining: torch.Tensor, out: torch.Tensor
) -> None:
    base = out if out.dtype == head.base_dtype else torch.empty_like(out, dtype=head.base_dtype)
    rows_product(dl.to(head.base_dtype), head.weight, remaining, base)
    if base is not out:
        out.copy_(base)
    if dxa is not None and head.lora_a is not None:
        accumulate(out, dxa, head.lora_a)


# ---- the Triton implementation


def _block(rows: int, V: int, device: torch.device) -> dict[str, int]:
    """Return LANES, WIDTH and num_warps of `cross_entropy_kernel`: 16 columns per thread."""
    block = max(16, min(power_of_two(V), MAX_BLOCK if rows > processors(device) else 2 * MAX_BLOCK))
    return {"LANES": block // 8, "WIDTH": 8, "num_warps": max(1, block // 512)}


def chunk_rows(T: int, row_bytes: int, vocabulary: int, width: int, gradient_bytes: int, device: torch.device) -> int:
    """Return how many of T tokens a chunk has.

    That is the maximum, or fewer if dl W, with `width` columns, then leaves less of the GPU idle.

    Args:
        T: the number of tokens.
        row_bytes: the bytes of a token's logits.
        vocabulary: the number of logits of a token.
        width: the hidden size.
        gradient_bytes: the bytes of the head's weight gradient, 0 if it is not needed.
        device: where the chunk is computed.
    """
    few, many = (op.chunk_rows(row_bytes, 1, budget) for budget in (CHUNK_BYTES, int(CHUNK_FRACTION * gradient_bytes)))
    most = max(min(few, CHUNK_ROWS), many)
    if most >= T or most < FEW_ROWS:
        return min(T, most)
    return _fastest_rows(T, most, vocabulary, width, device) if matmul_tiles.is_tuned(device) else most // 256 * 256


@lru_cache(maxsize=1024)
def _fastest_rows(T: int, most: int, vocabulary: int, width: int, device: torch.device) -> int:
    def expected(rows: int) -> float:
        times = (n * split_k.plan(r, width, vocabulary, device)[1] for n, r in ((T // rows, rows), (1, T % rows)) if r)
        return sum(times) + cdiv(T, rows) * CHUNK_MICROSECONDS

    return min(range(most // 128 * 128, FEW_ROWS - 1, -128), key=expected)


def _total_dtype(parameter: torch.Tensor, base_dtype: torch.dtype, chunks: int) -> torch.dtype:
    is_bfloat16 = parameter.dtype is base_dtype is torch.bfloat16
    few = is_bfloat16 and parameter.dim() == 2 and chunks <= MAX_BFLOAT16_ADDENDS
    return torch.bfloat16 if few else torch.float32


def _parameter_gradients(problem: op.Problem, chunks: int) -> LimitedSums:
    x, head, totals = problem.x, problem.head, {}
    for name, parameter in problem.parameters.items():
        if problem.needs_grad(name):
            dtype = _total_dtype(parameter, head.base_dtype, chunks)
            totals[name] = empty(*parameter.shape, like=x, dtype=dtype)
    return LimitedSums(head, totals)


def _cross_entropy(
    problem: op.Problem,
    logits: torch.Tensor,
    targets: torch.Tensor,
    order: torch.Tensor,
    remaining: torch.Tensor,
    losses: torch.Tensor,
) -> None:
    """Write the losses of the tokens `order`, and overwrite their logits with dl if a gradient is needed."""
    loss, V = problem.loss, logits.shape[1]
    cross_entropy_kernel[(logits.shape[0],)](
        logits, targets, order, remaining, problem.g.contiguous(), losses,
        V, logits.stride(0), loss.scale, loss.softcap, loss.label_smoothing, loss.z_loss,
        CAPPED=loss.softcap > 0, SMOOTHED=loss.label_smoothing > 0, EACH=problem.g.dim() > 0,
        GRADIENT=bool(problem.names), CLEAR=any(problem.needs_grad(name) for name in PARAMETERS),
        LOGITS_DTYPE=TL_DTYPES[problem.head.logits_dtype],
        **_block(logits.shape[0], V, logits.device),
    )  # fmt: skip


@torch.no_grad()
def compute(problem: op.Problem) -> op.Solution:
    """Compute losses and gradients with Triton kernels; see `op.compute`."""
    x, head = problem.x, problem.head
    targets, H, V = problem.targets.contiguous(), x.shape[-1], head.weight.shape[0]
    T, size, stride = targets.numel(), head.sum_dtype.itemsize, cdiv(V, 16) * 16
    gradient_bytes = V * H * size if problem.needs_grad("weight") else 0
    chunk = chunk_rows(T, stride * size, V, H, gradient_bytes, x.device)
    tokens = CompactedTokens(x.reshape(T, H), targets, problem.loss.ignore_index, V, head.sum_dtype, chunk)
    losses = empty(T, like=x, dtype=torch.float32)
    padded = empty(chunk, stride, like=x, dtype=head.sum_dtype)
    padded[:, V:] = 0  # the padding is read, though not used
    logits = padded[:, :V]
    sums = _parameter_gradients(problem, len(tokens.remaining))
    for i, rows in enumerate(op.chunks(T, chunk)):
        remaining, part = tokens.remaining[i], tokens.rows[rows]
        dl, xa = logits[: part.shape[0]], head.down(part)
        _write_logits(head, part, xa, remaining, dl)
        _cross_entropy(problem, dl, targets, tokens.order[rows], remaining, losses)
        if problem.names:
            dxa = head.up_gradient(dl)
            sums.remaining = remaining
            sums.add(dl, dxa, part, xa)
            if problem.needs_grad("x"):
                _write_input_gradient(head, dl, dxa, remaining, part)
    del padded, logits, dl  # free the logits before dx is allocated
    gradients = {name: with_strides_of(total, problem.parameters[name]) for name, total in sums.totals.items()}
    return losses, gradients | ({"x": tokens.scatter().reshape(x.shape)} if problem.needs_grad("x") else {})


def scale_gradient(
    t: torch.Tensor, g: torch.Tensor, dtype: torch.dtype, may_overwrite: bool, rows: op.KeptRows | None = None
) -> torch.Tensor:
    """Return t * g in `dtype` with t's strides, in t's memory with `may_overwrite`; see `op.scale_gradient`."""
    by_row = rows is not None or g.dim() > 0
    dense = t.is_contiguous() if by_row else t.stride() == torch.empty_like(t, device="meta").stride()
    t = t if dense else t.contiguous()
    in_place = may_overwrite and t.dtype == dtype
    y = t if in_place else empty(t.numel(), like=t, dtype=dtype).as_strided(t.shape, t.stride())
    multiply_kernel[(cdiv(t.numel(), 4096),)](
        t, g.contiguous(), None if rows is None else rows.labels.contiguous(), y, t.numel(), t.shape[-1],
        0 if rows is None else rows.ignore_index,
        EACH=g.dim() > 0, ROWS=rows is not None, IN_PLACE=in_place, BLOCK=4096, num_warps=8,
    )  # fmt: skip
    return y


def serves(x: torch.Tensor | None, base_dtype: torch.dtype, logits_dtype: torch.dtype, **given: Any) -> bool:
    dtypes = (base_dtype, logits_dtype, given["lora_dtype"] or base_dtype)
    tensors = (x, *(given[name] for name in PARAMETERS))
    return all(dtype in FLOAT_DTYPES for dtype in dtypes) and supported(*tensors) and (x is None or x.numel() > 0)


def serves_backward(grads: list[torch.Tensor], **given: Any) -> bool:
    saved = [given[f"grad_{name}"] for name in ("x", *PARAMETERS)]
    return serves(**given) and supported(*grads, *saved)


op.linear_cross_entropy.implementation(
    "triton",
    forward=partial(op.run_forward, compute),
    backward=partial(op.run_backward, compute, scale_gradient),
    serves=serves,
    serves_backward=serves_backward,
)
