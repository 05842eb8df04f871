"""Sums of matrix products with one rounding:  out = sum_i left_i @ right_i (+ bias), accumulated in float32.

A LoRA linear layer and its input gradient are each one such sum, so the low-rank term costs neither a second pass over
the output nor a rounding of its own.  With x (T, K), W (N, K), A (R, K), B (N, R):

    forward           y  = xa B^T + x W^T (+ b)          xa  = scaling * x A^T     (T, R)
    backward          dx = dxa A  + dy W                 dxa = scaling * dy B      (T, R)
    group backward    dx = dxa A  + dy_1 W_1 + dy_2 W_2 + dy_3 W_3     dxa, A: the members' concatenated along R

`low_rank.py` computes the thin factors xa and dxa, including the scaling.

One loop runs over the K dimensions of all products in turn, so a second product costs its own arithmetic and no more:
no second prologue, no pipeline drain.  Programs are persistent, and the loop over tiles is flattened into the same
loop, so the next tile's operands are loaded while the last tile is stored.  Operands are loaded through tensor
descriptors (TMA), which are selected in each step.

The number of rows, or of summed rows, may be an integer in device memory: `limited_rows` and `limited_depth` stop
there, so a loss can skip its ignored rows without a synchronization.

Operands are all bfloat16 or all float16. `supports` says whether the kernels support a sum, `serves` whether they also
beat cuBLAS, with each further product added onto the output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels.core.devices import HALF_DTYPES, gpu, processors
from fastlora.kernels.triton.blocks.matmul_tiles import is_faster, is_tuned, tile_of
from fastlora.kernels.triton.host import precompile
from fastlora.kernels.triton.host.kernel_cache import descriptor
from fastlora.kernels.triton.host.launch import IS_INTERPRETED, allocate, cdiv

Addend = tuple[torch.Tensor, torch.Tensor]
"""left (M, K) and right (K, N) of the product left @ right."""

MAX_ADDENDS = 4
GROUP_M = 16


@triton.jit
def tile_position(tile, rows, cols, GROUP_M: tl.constexpr):
    """Return the row and column of a tile, in groups of GROUP_M rows for L2 reuse."""
    group = tile // (GROUP_M * cols)
    first = group * GROUP_M
    height = min(rows - first, GROUP_M)
    within = tile - group * GROUP_M * cols
    return first + within % height, within // height


@triton.jit
def _store_tile(out, t, m, n, ADD: tl.constexpr, INTERPRETED: tl.constexpr):
    """Store t to out[m:, n:], or add it there.

    The addition is a TMA reduction, which saves loading out. Each element is added to once per launch, so it is
    deterministic.
    """
    t = t.to(out.dtype)
    if ADD and not INTERPRETED:
        out.atomic_add([m, n], t)
    elif ADD:
        out.store([m, n], out.load([m, n]) + t)
    else:
        out.store([m, n], t)


@triton.jit
def _store(out, acc, m, n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, ADD: tl.constexpr, INTERPRETED: tl.constexpr):
    """Store acc to out[m:, n:], or add it there, in two halves: that halves the shared memory of the store, which
    leaves room for one more pipeline stage."""
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
    _store_tile(out, left, m, n, ADD, INTERPRETED)
    _store_tile(out, right, m, n + HALF, ADD, INTERPRETED)


@precompile.kernel(do_not_specialize=["M"])
def sum_kernel(
    out, left0, right0, left1, right1, left2, right2, left3, right3, bias_ptr, count_ptr,
    M, N, K0, K1, K2, K3,
    LEFT_T: tl.constexpr, RIGHT_T: tl.constexpr, LIMIT: tl.constexpr, ADD: tl.constexpr, INTERPRETED: tl.constexpr,
    PROGRAMS: tl.constexpr, GROUP_M: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (M, N) = sum of left_i @ right_i (+ bias), for every PROGRAMS-th tile.

    LEFT_T, RIGHT_T: the operand is stored transposed, as (K, M) or (N, K).
    LIMIT: "rows" takes M from *count_ptr, "depth" takes K0 from there, rounded down to a multiple of BLOCK_K.
    """
    if LIMIT == "rows":
        M = min(M, tl.load(count_ptr).to(tl.int32))
    end0 = tl.cdiv(K0, BLOCK_K)
    if LIMIT == "depth":
        end0 = min(K0, tl.load(count_ptr).to(tl.int32)) // BLOCK_K
    end1 = end0
    end2 = end0
    steps = end0
    if left1 is not None:
        end1 = end0 + tl.cdiv(K1, BLOCK_K)
        end2 = end1
        steps = end1
    if left2 is not None:
        end2 = end1 + tl.cdiv(K2, BLOCK_K)
        steps = end2
    if left3 is not None:
        steps = end2 + tl.cdiv(K3, BLOCK_K)
    rows = tl.cdiv(M, BLOCK_M)
    cols = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), rows * cols, PROGRAMS, flatten=True):
        row, col = tile_position(tile, rows, cols, GROUP_M)
        m = row * BLOCK_M
        n = col * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for step in tl.range(0, steps):
            # selecting a descriptor only selects an address, so this stays a single loop
            left = left0
            right = right0
            begin = end0 * 0
            if left1 is not None and step >= end0:
                left = left1
                right = right1
                begin = end0
            if left2 is not None and step >= end1:
                left = left2
                right = right2
                begin = end1
            if left3 is not None and step >= end2:
                left = left3
                right = right3
                begin = end2
            k = (step - begin) * BLOCK_K
            a = left.load([k, m]).T if LEFT_T else left.load([m, k])
            b = right.load([n, k]).T if RIGHT_T else right.load([k, n])
            acc = tl.dot(a, b, acc)
        if bias_ptr is not None:
            bias_cols = n + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + bias_cols, mask=bias_cols < N, other=0.0).to(tl.float32)[None, :]
        _store(out, acc, m, n, BLOCK_M, BLOCK_N, ADD, INTERPRETED)


@precompile.kernel(do_not_specialize=["T"])
def tail_kernel(t_ptr, out_ptr, count_ptr, T, C, t_stride, out_stride, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr):
    """out (BLOCK_K, C) = t[count // BLOCK_K * BLOCK_K : count], padded with zeros, for BLOCK_C columns of t (T, C)."""
    count = min(T, tl.load(count_ptr).to(tl.int64))
    row = tl.arange(0, BLOCK_K)[:, None]
    source = count // BLOCK_K * BLOCK_K + row
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    t = tl.load(t_ptr + source * t_stride + cols, mask=(source < count) & (cols < C), other=0.0)
    tl.store(out_ptr + row * out_stride + cols, t, mask=cols < C)


def sum_of_products(
    addends: Sequence[Addend],
    bias: torch.Tensor | None = None,
    scaling: float = 1.0,
    dtype: torch.dtype | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return left_0 @ right_0 * scaling + left_1 @ right_1 + ... (+ bias (N,)) as (M, N), for one to four addends.

    The low-rank addend comes first. A `scaling` other than 1 costs a kernel and a rounding of left_0, so it is better
    to compute left_0 with it. The same dimension has to be contiguous in all lefts, and in all rights.
    """
    left, right = addends[0]
    if scaling != 1.0:
        addends = [(left * scaling, right), *addends[1:]]
    if out is None:
        out = allocate((left.shape[0], right.shape[1]), dtype or left.dtype, left.device)
    return _launch(out, addends, bias=bias)


def limited_rows(left: torch.Tensor, right: torch.Tensor, count: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write left[:count] @ right to out[:count] and return `out`; `count` is an int32 or int64 scalar on the device.

    Rows of `out` from `count` to the end of its tile are undefined, rows beyond are not written.
    """
    return _launch(out, [(left, right)], count=count, limit="rows")


def limited_depth(
    left: torch.Tensor, right: torch.Tensor, count: torch.Tensor, out: torch.Tensor, add: bool = False
) -> torch.Tensor:
    """Write left[:, :count] @ right[:count] to `out` (M, N), or add it there, and return `out`.

    With `add` the product is rounded to out's dtype, and so is the sum. `count` is a scalar on the device; values
    beyond it are not used, not even if they are nan. left (M, T) is the transpose of a contiguous matrix, right (T, N)
    is contiguous.
    """
    tile = tile_of(out)
    tails = [_tail(t, count, tile.k) for t in (left.t(), right)]
    return _launch(out, [(left, right), (tails[0].t(), tails[1])], count=count, limit="depth", add=add)


def _tail(t: torch.Tensor, count: torch.Tensor, depth: int) -> torch.Tensor:
    """Return the rows of t before `count` that do not fill a whole step of `depth` rows, padded with zeros to it."""
    T, C = t.shape
    out = allocate((depth, cdiv(C, 16) * 16), t.dtype, t.device)[:, :C]  # TMA requires rows aligned to 16 bytes
    tail_kernel[(cdiv(C, 128),)](
        t, out, count, T, C, t.stride(0), out.stride(0), BLOCK_K=depth, BLOCK_C=128, num_warps=4
    )
    return out


def serves(addends: Sequence[Addend], bias: torch.Tensor | None = None, out: torch.Tensor | None = None) -> bool | str:
    """Return True if `sum_of_products` supports these operands and beats cuBLAS, otherwise the reason why not."""
    verdict = supports(addends, bias, out)
    if verdict is not True:
        return verdict
    left, right = addends[0]
    if left.device.type == "cpu":
        return True
    K = sum(a.shape[1] for a, _ in addends)
    return is_faster(left.shape[0], right.shape[1], K, len(addends) - 1, gpu(left.device))


def supports(
    addends: Sequence[Addend], bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> bool | str:
    """Return True if the kernels support these operands, otherwise the reason why not."""
    left, right = addends[0]
    if len(addends) > MAX_ADDENDS:
        return f"more than {MAX_ADDENDS} products"
    if not is_tuned(left.device):
        return "no tiles were measured for this GPU"
    if left.dtype not in HALF_DTYPES:
        return f"{left.dtype} operands"
    left_t, right_t = _transposed(left), _transposed(right)
    for a, b in addends:
        if a.dtype != left.dtype or b.dtype != left.dtype:
            return "operands of several dtypes"
        if _transposed(a) != left_t or _transposed(b) != right_t:
            return "operands laid out in several ways"
        if not (fits_descriptor(a) and fits_descriptor(b)):
            return "an operand whose rows do not start at multiples of 16 bytes"
    if right.shape[1] * left.element_size() % 16 if out is None else not fits_descriptor(out):
        return "an output whose rows do not start at multiples of 16 bytes"
    if bias is not None and bias.stride(0) != 1:
        return "a bias with gaps between its elements"
    return True


def fits_descriptor(t: torch.Tensor) -> bool:
    """Return whether a tensor descriptor supports this matrix or its transpose: one dimension contiguous, the other's
    stride and the address multiples of 16 bytes."""
    row_stride, col_stride = t.stride()
    step = (row_stride if col_stride == 1 else col_stride) * t.element_size()
    return 1 in (row_stride, col_stride) and step > 0 and step % 16 == 0 and t.data_ptr() % 16 == 0 and t.numel() > 0


def make_descriptor(t: torch.Tensor, *block: int) -> TensorDescriptor:
    """Return a tensor descriptor of a matrix for which `fits_descriptor` is true, with blocks of the given shape."""
    make = TensorDescriptor if IS_INTERPRETED else descriptor
    return make(t, list(t.shape), list(t.stride()), list(block))


def _transposed(t: torch.Tensor) -> bool:
    """Return whether columns, not rows, are contiguous."""
    return t.stride(1) != 1


def _launch(
    out: torch.Tensor,
    addends: Sequence[Addend],
    bias: torch.Tensor | None = None,
    count: torch.Tensor | None = None,
    limit: str = "none",
    add: bool = False,
) -> torch.Tensor:
    M, N = out.shape
    if M == 0:
        return out
    tile = tile_of(out)
    left_t, right_t = _transposed(addends[0][0]), _transposed(addends[0][1])
    operands: list[TensorDescriptor | None] = []
    depths: list[int] = []
    for left, right in addends:
        operands.append(make_descriptor(left.t(), tile.k, tile.m) if left_t else make_descriptor(left, tile.m, tile.k))
        operands.append(
            make_descriptor(right.t(), tile.n, tile.k) if right_t else make_descriptor(right, tile.k, tile.n)
        )
        depths.append(left.shape[1])
    missing = MAX_ADDENDS - len(addends)
    programs = processors(out.device)
    sum_kernel[(min(programs, cdiv(M, tile.m) * cdiv(N, tile.n)),)](
        make_descriptor(out, tile.m, tile.n // 2), *operands, *[None] * (2 * missing), bias, count,
        M, N, *depths, *[0] * missing,
        LEFT_T=left_t, RIGHT_T=right_t, LIMIT=limit, ADD=add, INTERPRETED=IS_INTERPRETED,
        PROGRAMS=programs, GROUP_M=GROUP_M, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
