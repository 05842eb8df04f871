"""A kernel that stores the random words of `dropout_kernel`, starting at any counter."""

import torch
import triton
import triton.language as tl

from fastlora.kernels.triton.dropout import random_words


@triton.jit(do_not_specialize=["first"])
def random_words_kernel(seed_ptr, out_ptr, first, BLOCK: tl.constexpr):
    counter = first.to(tl.int64) + tl.arange(0, BLOCK // 4)
    tl.store(out_ptr + tl.arange(0, BLOCK), random_words(tl.load(seed_ptr), counter).to(tl.int64))


def words(seed: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Return the words of `count` elements (a power of two), starting at element 4 * first."""
    out = torch.empty(count, dtype=torch.int64, device=seed.device)
    random_words_kernel[(1,)](seed, out, first, BLOCK=count)
    return out
