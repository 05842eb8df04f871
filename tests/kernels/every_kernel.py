"""Launches every kernel on this GPU, for tools such as `compute-sanitizer --tool memcheck python FILE`.

All ops of two models run forward and backward, for a number of tokens that is not a multiple of any tile, and with
dropout, in all dtypes (or those on the command line), with the gradients of LoRA and with all gradients. Set
PYTORCH_NO_CUDA_MEMORY_CACHING=1 to tell buffers apart. Neither racecheck nor initcheck supports TMA, which 16-bit
products use: `FILE float32` has none.
"""

from __future__ import annotations

import argparse
import sys

import torch
from dropout_cases import dropout_cases
from op_cases import require_every_gradient

from fastlora.kernels.core import implementations
from fastlora.tools.bench.accuracy import cotangents, flat, leaves
from fastlora.tools.bench.cases import Case, cases
from fastlora.tools.bench.shapes import SHAPES

DTYPES = ("bfloat16", "float16", "float32")


def run(case: Case, dtype: torch.dtype, everything: bool) -> None:
    arguments = case.arguments(dtype, torch.device("cuda"))
    if everything and case.grad_arguments:
        require_every_gradient(arguments)
    outputs = flat(case.op(**arguments))
    wanted = list(leaves(arguments).values())
    if wanted:
        torch.autograd.grad(outputs, wanted, cotangents(outputs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dtypes", nargs="*", default=DTYPES)
    parser.add_argument("--tokens", type=int, default=333)
    options = parser.parse_args()
    count, dtypes = 0, [getattr(torch, name) for name in options.dtypes]
    with implementations.only("triton"):
        for name in ("Qwen3-0.6B", "BERT-large"):
            for case in (*cases(SHAPES[name], options.tokens, [16]), *dropout_cases()):
                for dtype in dtypes:
                    for everything in (False, True):
                        run(case, dtype, everything)
                        count += 1
    torch.cuda.synchronize()
    print(f"{count} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
