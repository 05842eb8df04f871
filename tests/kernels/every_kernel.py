"""Launches every kernel on this GPU, for tools that watch it: `compute-sanitizer --tool memcheck python FILE`.

Every op runs forward and backward at the places of two models, for a number of tokens that no tile divides, and with
dropout; in every dtype (or in those that are named on the command line), with the gradients that LoRA wants and with
all. To see single buffers, set PYTORCH_NO_CUDA_MEMORY_CACHING=1. Neither racecheck nor initcheck follows Hopper's copy
engine, which products of 16 bits use: `FILE float32` has none.
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
    if everything and case.wanted:
        require_every_gradient(arguments)
    outputs = flat(case.op(**arguments))
    wanted = list(leaves(arguments).values())
    if wanted:
        torch.autograd.grad(outputs, wanted, cotangents(outputs))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dtypes", nargs="*", default=DTYPES)
    parser.add_argument("--tokens", type=int, default=333)
    asked = parser.parse_args()
    count, dtypes = 0, [getattr(torch, name) for name in asked.dtypes]
    with implementations.only("triton"):
        for name in ("Qwen3-0.6B", "BERT-large"):
            for case in (*cases(SHAPES[name], asked.tokens, [16]), *dropout_cases()):
                for dtype in dtypes:
                    for everything in (False, True):
                        run(case, dtype, everything)
                        count += 1
    torch.cuda.synchronize()
    print(f"{count} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
