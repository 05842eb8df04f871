"""Cross-entropy of a linear head's logits: `kernels/formulas/linear_cross_entropy.py` has the formulas.

Tokens that are kept come first, by a permutation that is made on the device; so is their count, which the host never
learns.  For each chunk of them one product makes the logits, one kernel turns these in place into dl, and one product
per gradient follows:

    rank_kernel             labels -> how many are kept up to each
    gather_kernel           x, labels -> the kept rows of x, in order, then zeros; and the permutation
    product of rows         logits = x W^T
    cross_entropy_kernel    logits -> loss, dl
    product over rows       dW += dl^T x
    product of rows         dx = dl W, in place of the rows of x
    scatter_kernel          dx to where the tokens are

A row of logits is read twice, the second time from the cache as long as all rows in flight fit there.  Products go
through `rows_product` and `depth_product`, which stop at the last row that is worth the work; `split_k.py` has dl W
where its tiles would not fill the GPU.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels.core.devices import FLOATS, processors, supported
from fastlora.kernels.core.implementations import laid_out
from fastlora.kernels.formulas import linear_cross_entropy as op
from fastlora.kernels.formulas.lm_head import PARAMETERS, Head, Sums, accumulate
from fastlora.kernels.triton.blocks import matmul, matmul_tiles, split_k
from fastlora.kernels.triton.blocks.compact_tokens import Kept
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.launch import TL_DTYPES, cdiv, empty, power_of_two

CHUNK_BYTES, CHUNK_ROWS = 512 << 20, 1024
"""Logits and tokens of a chunk, at most: more are not faster. But a gradient of the head is read and written for each
chunk, so if one is held anyway logits may take as many bytes as this share of it:"""
CHUNK_SHARE = 0.6
CHUNK_MICROSECONDS = 30.0
"""What a chunk costs beside its share of the work: kernels that start and end."""
FEW_ROWS = 512
"""Up to here little can be skipped, and cuBLAS is faster where it can read the rows: it cuts the summed dimension."""
ADDENDS = 8
"""How many chunks may add to a sum that is rounded to bfloat16 each time; more add up in float32."""
WIDEST = 8192
"""Logits of a row that a program holds at a time; twice as many where there are fewer rows than processors. Few rows
are in flight then, and fit into the cache until they are read again. Measured on an H200, bfloat16."""


@triton.jit
def _tanh(u):
    """tanh, near 0 by an odd polynomial of its own, where 1 - 2 / (exp(2u) + 1) has lost its digits."""
    s = u * u
    p = (((-0.005515176337 * s + 0.0204694327) * s - 0.05368802697) * s + 0.13330830634) * s - 0.3333325982
    return tl.where(tl.abs(u) < 0.65, u + u * s * p, 1.0 - 2.0 / (tl.exp(2.0 * u) + 1.0))


@triton.jit
def _cap(logits, scale, softcap, CAPPED: tl.constexpr, LOGITS_DTYPE: tl.constexpr):
    """z and dz/dl, without the factor scale, of logits that are as the head made them."""
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
    """max(z), sum(exp(z - max)) and, if SUM, sum(z) of a row. Each lane keeps these of its own WIDTH columns of every
    block, so that only the end needs other lanes' numbers."""
    lanes, offsets = tl.arange(0, LANES)[:, None] * WIDTH, tl.arange(0, WIDTH)[None, :]
    peak = tl.full((LANES,), float("-inf"), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    plain = tl.zeros((LANES,), tl.float32)
    for start in range(0, V, LANES * WIDTH):
        cols = start + lanes + offsets
        mask = cols < V
        logits = tl.load(row_ptr + cols, mask=cols < width, other=0.0, eviction_policy="evict_last")
        z, _ = _cap(logits, scale, softcap, CAPPED, LOGITS_DTYPE)
        if SUM:
            plain += tl.sum(tl.where(mask, z, 0.0), axis=1)
        z = tl.where(mask, z, float("-inf"))
        higher = tl.maximum(peak, tl.max(z, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is nan, and exp of it has to be 0
        total = total * tl.exp(peak - base) + tl.sum(tl.exp(z - base[:, None]), axis=1)
        peak = higher
    highest = tl.max(peak, axis=0)
    total = tl.where(peak == float("-inf"), 0.0, total * tl.exp(peak - highest))
    return highest, tl.sum(total, axis=0), tl.sum(plain, axis=0)


@precompile.kernel(do_not_specialize_on_alignment=["remaining_ptr"])
def cross_entropy_kernel(
    logits_ptr, labels_ptr, order_ptr, remaining_ptr, g_ptr, loss_ptr,
    V, logits_stride, scale, softcap, smoothing, z_loss,
    CAPPED: tl.constexpr, SMOOTHED: tl.constexpr, EACH: tl.constexpr, GRADIENT: tl.constexpr, CLEAR: tl.constexpr,
    LOGITS_DTYPE: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The loss of one row of logits, and dl in their place, for a g of the token's own if EACH.

    Rows from `remaining` on are ignored tokens: their loss is 0, and dl too, if CLEAR; else nobody reads it. Rows lie
    logits_stride apart, a multiple of 16, and all of that is read and written, so that accesses are wide for any V.
    """
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(order_ptr + row)
    row_ptr = logits_ptr + row * logits_stride
    if row >= tl.load(remaining_ptr):
        tl.store(loss_ptr + token, 0.0)
        if CLEAR:
            lane = tl.arange(0, LANES * WIDTH)
            for first in range(0, V, LANES * WIDTH):
                nothing = tl.zeros((LANES * WIDTH,), logits_ptr.dtype.element_ty)
                tl.store(row_ptr + first + lane, nothing, mask=first + lane < logits_stride)
        return
    label = tl.load(labels_ptr + token)
    logit = tl.load(row_ptr + label, mask=(label >= 0) & (label < V), other=0.0)
    picked, _ = _cap(logit, scale, softcap, CAPPED, LOGITS_DTYPE)
    peak, total, plain = _log_sum_exp(
        row_ptr, V, logits_stride, scale, softcap, SMOOTHED, CAPPED, LOGITS_DTYPE, LANES, WIDTH
    )
    log_sum = tl.log(total)
    loss = log_sum + (peak - picked)
    if SMOOTHED:
        loss = (1.0 - smoothing) * loss + smoothing * (log_sum + (peak - plain / V))
    lse = peak + log_sum
    tl.store(loss_ptr + token, loss + z_loss * lse * lse)
    if GRADIENT:
        factor = scale * tl.load(g_ptr + (token if EACH else 0))
        weight = (1.0 + 2.0 * z_loss * lse) / total
        lanes, offsets = tl.arange(0, LANES)[:, None] * WIDTH, tl.arange(0, WIDTH)[None, :]
        tl.debug_barrier()  # every lane has read what all write now
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
    """t times g, one number for all or one for each H elements; ROWS: 0 where the label of these is ignored. IN_PLACE:
    y is t, and there is nothing to do for 1."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < N
    g = tl.load(g_ptr + at // H, mask=mask, other=0.0) if EACH else tl.load(g_ptr)
    if IN_PLACE and not EACH:  # noqa: SIM102  (the outer is decided when it is compiled)
        if g == 1.0:
            return
    t = tl.load(t_ptr + at, mask=mask, other=0.0).to(tl.float32) * g
    if ROWS:
        t = tl.where(tl.load(labels_ptr + at // H, mask=mask, other=0) == ignore_index, 0.0, t)
    tl.store(y_ptr + at, t.to(y_ptr.dtype.element_ty), mask=mask)


# ---- products


def _library_reads(t: torch.Tensor) -> bool:
    return t.shape[1] * t.itemsize % 16 == 0


def rows_product(left: torch.Tensor, right: torch.Tensor, remaining: torch.Tensor, out: torch.Tensor) -> None:
    """out[:remaining] = left[:remaining] @ right; other rows of out may become anything."""
    few = left.shape[0] < FEW_ROWS and _library_reads(out)
    if few or matmul.readable([(left, right)], out=out) is not True:
        torch.mm(left, right, out=out)
    elif left.stride(1) == 1 and (slices := split_k.plan(len(out), out.shape[1], left.shape[1], out.device)[0]) > 1:
        split_k.limited_rows(left, right, remaining, out, slices)
    else:
        matmul.limited_rows(left, right, remaining, out)


def depth_product(
    total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, remaining: torch.Tensor, beta: float
) -> None:
    """total = beta * total + left[:remaining]^T @ right[:remaining]; both are 0 in the rows from `remaining` on."""
    few = 1 < left.shape[0] <= FEW_ROWS and _library_reads(total)
    if not few and matmul.readable([(left.t(), right)], out=total) is True:
        matmul.limited_depth(left.t(), right, remaining, total, add=beta != 0)
    else:
        accumulate(total, left.t(), right, beta)


class LimitedSums(Sums):
    """Sums over the tokens of a chunk that are kept."""

    remaining: torch.Tensor

    def add_weight(self, total: torch.Tensor, dl: torch.Tensor, x: torch.Tensor, beta: float) -> None:
        depth_product(total, dl, x, self.remaining, beta)


def _make_logits(
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


def _input_gradient(
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
    """Lanes of a program, columns of each, and warps: 16 columns for each thread."""
    block = max(16, min(power_of_two(V), WIDEST if rows > processors(device) else 2 * WIDEST))
    return {"LANES": block // 8, "WIDTH": 8, "num_warps": max(1, block // 512)}


def chunk_rows(T: int, row_bytes: int, vocabulary: int, width: int, held: int, device: torch.device) -> int:
    """How many of T tokens to take at a time, with `held` bytes of a gradient of the head at hand: as many as may be,
    or fewer if that leaves less of the GPU idle in each chunk's product with `width` columns."""
    few, many = (op.chunk_rows(row_bytes, 1, budget) for budget in (CHUNK_BYTES, int(CHUNK_SHARE * held)))
    most = max(min(few, CHUNK_ROWS), many)
    if most >= T or most < FEW_ROWS:
        return min(T, most)
    return _fullest(T, most, vocabulary, width, device) if matmul_tiles.measured(device) else most // 256 * 256


@lru_cache(maxsize=1024)
def _fullest(T: int, most: int, vocabulary: int, width: int, device: torch.device) -> int:
    def expected(rows: int) -> float:
        times = (n * split_k.plan(r, width, vocabulary, device)[1] for n, r in ((T // rows, rows), (1, T % rows)) if r)
        return sum(times) + cdiv(T, rows) * CHUNK_MICROSECONDS

    return min(range(most // 128 * 128, FEW_ROWS - 1, -128), key=expected)


def _total_dtype(parameter: torch.Tensor, base_dtype: torch.dtype, chunks: int) -> torch.dtype:
    few = parameter.dtype is base_dtype is torch.bfloat16 and parameter.dim() == 2 and chunks <= ADDENDS
    return torch.bfloat16 if few else torch.float32


def _sums(problem: op.Problem, chunks: int) -> LimitedSums:
    """Totals that nothing was added to, for the parameters that want a gradient."""
    x, head, totals = problem.x, problem.head, {}
    for name, parameter in problem.parameters.items():
        if problem.wants(name):
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
    """Losses of the tokens `order`, and dl in place of their logits if a gradient is wanted."""
    loss, V = problem.loss, logits.shape[1]
    cross_entropy_kernel[(logits.shape[0],)](
        logits, targets, order, remaining, problem.g.contiguous(), losses,
        V, logits.stride(0), loss.scale, loss.softcap, loss.label_smoothing, loss.z_loss,
        CAPPED=loss.softcap > 0, SMOOTHED=loss.label_smoothing > 0, EACH=problem.g.dim() > 0,
        GRADIENT=bool(problem.names), CLEAR=any(problem.wants(name) for name in PARAMETERS),
        LOGITS_DTYPE=TL_DTYPES[problem.head.logits_dtype],
        **_block(logits.shape[0], V, logits.device),
    )  # fmt: skip


@torch.no_grad()
def solve(problem: op.Problem) -> op.Solution:
    """The Triton form's way."""
    x, head = problem.x, problem.head
    targets, H, V = problem.targets.contiguous(), x.shape[-1], head.weight.shape[0]
    T, size, stride = targets.numel(), head.sum_dtype.itemsize, cdiv(V, 16) * 16
    held = V * H * size if problem.wants("weight") else 0
    chunk = chunk_rows(T, stride * size, V, H, held, x.device)
    kept = Kept(x.reshape(T, H), targets, problem.loss.ignore_index, V, head.sum_dtype, chunk)
    losses = empty(T, like=x, dtype=torch.float32)
    padded = empty(chunk, stride, like=x, dtype=head.sum_dtype)
    padded[:, V:] = 0  # which is read, though nothing is made of it
    logits = padded[:, :V]
    sums = _sums(problem, len(kept.remaining))
    for i, rows in enumerate(op.chunks(T, chunk)):
        remaining, part = kept.remaining[i], kept.rows[rows]
        dl, xa = logits[: part.shape[0]], head.project(part)
        _make_logits(head, part, xa, remaining, dl)
        _cross_entropy(problem, dl, targets, kept.order[rows], remaining, losses)
        if problem.names:
            dxa = head.unproject(dl)
            sums.remaining = remaining
            sums.add(dl, dxa, part, xa)
            if problem.wants("x"):
                _input_gradient(head, dl, dxa, remaining, part)
    del padded, logits, dl  # before dx takes memory
    made = {name: laid_out(total, problem.parameters[name]) for name, total in sums.totals.items()}
    return losses, made | ({"x": kept.put_back().reshape(x.shape)} if problem.wants("x") else {})


def multiplied(
    t: torch.Tensor, g: torch.Tensor, dtype: torch.dtype, may_overwrite: bool, rows: op.KeptRows | None = None
) -> torch.Tensor:
    """Return t times g, one number or one for each row, rounded once, and laid out as t.

    With `may_overwrite` the result is in t's memory. Rows that are not kept become 0."""
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
    return all(dtype in FLOATS for dtype in dtypes) and supported(*tensors) and (x is None or x.numel() > 0)


def serves_backward(grads: list[torch.Tensor], **given: Any) -> bool:
    made = [given[f"made_{name}"] for name in ("x", *PARAMETERS)]
    return serves(**given) and supported(*grads, *made)


op.linear_cross_entropy.implementation(
    "triton",
    forward=partial(op.make, solve),
    backward=partial(op.differentiate, solve, multiplied),
    serves=serves,
    serves_backward=serves_backward,
)
