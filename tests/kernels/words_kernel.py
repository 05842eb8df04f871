"""A kernel that stores the random words that `dropout_kernel` compares, from any counter on."""

import torch
import triton
import triton.language as tl

from fastlora.kernels.triton.dropout import random_words


@triton.jit(do_not_specialize=["first"])
def words_kernel(seed_ptr, out_ptr, first, BLOCK: tl.constexpr):
    counter = first.to(tl.int64) + tl.arange(0, BLOCK // 4)
    tl.store(out_ptr + tl.arange(0, BLOCK), random_words(tl.load(seed_ptr), counter).to(tl.int64))


def words(seed: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """The words of `count` elements (a power of two) from element 4 * first on."""
    out = torch.empty(count, dtype=torch.int64, device=seed.device)
    words_kernel[(1,)](seed, out, first, BLOCK=count)
    return out
