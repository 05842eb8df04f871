"""Compiles every kernel that the ops launch for absent GPUs: `compile_for_gpus.py CAPABILITY...`, e.g. 90.

The ops run on meta tensors, whose device is assumed to have the capability, and launches are recorded instead of made;
each different launch is then compiled. Prints registers, local memory (spills) and shared memory of each kernel, and
exits with 1 if a kernel does not compile, does not fit, or spills.

Of several capabilities, and of float16 and bfloat16, each kernel is compiled for a random one, and has to fit all GPUs
on which it is launched: those of one generation differ only in the last compilation step.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from dropout_cases import dropout_cases
from op_cases import require_every_gradient
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from fastlora.kernels.core import devices, implementations
from fastlora.kernels.core.execution import Call, run_on_meta
from fastlora.kernels.core.quantized_weight import QuantizedWeight
from fastlora.kernels.ops import dequantize_4bit
from fastlora.kernels.triton.blocks import gemv_4bit, matmul
from fastlora.kernels.triton.host import precompile
from fastlora.tools.bench.cases import Case, cases
from fastlora.tools.bench.shapes import SHAPES

SHARED_MEMORY = {70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227}
"""KiB of shared memory that one program can use, by compute capability."""

PROCESSORS = 132

HALF = re.compile(r"\b(bf|fp)16\b")
"""The types of 16 bits, which differ by the instructions that convert and multiply them."""

CACHE_HINT = "READ"
"""The parameter for the eviction policy of loads, which changes neither registers nor memory of a kernel."""


def launches(capability: int) -> list[precompile.RecordedLaunch]:
    """Return what the ops of a large and of a small model launch in training, for one token and for many."""
    devices.set_meta_gpu(devices.Gpu(divmod(capability, 10), PROCESSORS))
    with (
        patch.object(matmul, "serves", matmul.supports),  # also where cuBLAS is faster
        implementations.only("triton"),
        implementations.for_precompilation(),
        precompile.recorded() as recorded,
    ):
        for dtype in [torch.float16, *([torch.bfloat16] if capability >= 80 else []), torch.float32]:
            for case in _cases():
                if case.op.implementations.accelerated:
                    _run(case, dtype)
            _multiply_by_four_bits(dtype)
    return recorded


def _cases() -> Iterator[Case]:
    for name in ("Qwen3-0.6B", "Gemma-2-9B", "BERT-large"):
        for tokens in (1, 300, 8192):
            yield from cases(SHAPES[name], tokens, [8, 64])
    yield from dropout_cases()


def _run(case: Case, dtype: torch.dtype) -> None:
    """Run forward and backward on meta tensors, with all gradients and with those of LoRA."""

    def empty(*shape: int, dtype: torch.dtype = dtype, **_: Any) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    arguments = case.arguments_from(empty, dtype)
    for everything in (False, True):
        if everything and case.grad_arguments:
            require_every_gradient(arguments)
        values = case.op.order(arguments)
        run_on_meta(Call(case.op, values, [t is not None and t.requires_grad for t in case.op.leaves.flat(values)]))


def _multiply_by_four_bits(dtype: torch.dtype) -> None:
    """Run products of few rows with 4-bit weights, on GPUs that have a kernel for them."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    N, K, R = 14336, 4096, 16
    packed, blocks = empty(N * K // 2, 1, dtype=torch.uint8), N * K // 64
    plain = (packed, empty(blocks, dtype=torch.float32), None, None, None)
    twice = (
        packed,
        empty(blocks, dtype=torch.uint8),
        *(empty(n, dtype=torch.float32) for n in (blocks // 256, 256, 1)),
    )
    for scales in (plain, twice):
        weight = QuantizedWeight(dequantize_4bit, (*scales, 64, 256, "nf4", N, K, dtype))
        for T in (1, 16, 64):
            x, low = empty(T, K), (empty(T, R), empty(N, R).t())
            if gemv_4bit.serves(weight, x, low, None):
                gemv_4bit.product(x, weight, low, empty(N), dtype)


def compiled(made: precompile.RecordedLaunch, capability: int) -> tuple[str, Any]:
    """Return the kernel's name and specialization, and the compiled kernel."""
    function, args, kwargs = made
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    binder = create_function_from_signature(function.signature, function.params, backend)
    kwargs = {**kwargs, "debug": False, "instrumentation_mode": ""}
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constants, attributes = function._pack_args(backend, kwargs, bound, specialization, options)
    names = [param.name for param in function.params]
    shown = {names[index]: value for (index, *_), value in constants.items() if names[index] != CACHE_HINT}
    return f"{function.fn.__name__} {signature} {shown} {options.num_warps}", lambda: triton.compile(
        ASTSource(function, signature, constants, attributes), target=target, options=options.__dict__
    )


def usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers, and the bytes of local memory, per thread."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = [int(n) for name in ("REG", "STACK") for n in re.findall(rf"{name}:(\d+)", text)]
    return found[0], found[1]


def main(*capabilities: int) -> int:
    failed, kernels = 0, dict[str, dict[tuple[int, str], Any]]()
    for capability in capabilities:
        for made in launches(capability):
            name, compile_ = compiled(made, capability)
            kernels.setdefault(HALF.sub("16 bits", name), {})[capability, name] = compile_
    for key, compilers in kernels.items():
        capability, name = random.Random(key).choice(list(compilers))
        try:
            kernel = compilers[capability, name]()
            registers, local = usage(kernel.asm["cubin"])
            shared = kernel.metadata.shared
        except Exception as problem:
            print(f"FAILED sm_{capability} {name}: {type(problem).__name__}: {str(problem)[-500:]}")
            failed += 1
            continue
        good = local == 0 and shared <= min(SHARED_MEMORY[each] for each, _ in compilers) * 1024
        failed += not good
        used = f"sm_{capability}, {registers} registers, {local} B local, {shared} B shared"
        print(f"{'ok    ' if good else 'FAILED'} {used}: {name}")
    print(f"{', '.join(f'sm_{each}' for each in capabilities)}: {len(kernels)} kernels, {failed} failed")
    return 1 if failed or not kernels else 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
